"""The processes of a run: of this launcher or of torchrun, on GPUs or, without one, on the CPU."""

import argparse
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from multiprocessing import connection

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import multiprocessing
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from msad_kd.utils.compat import create_local_process_group
from msad_kd.utils.errors import InputError, input_error_of
from msad_kd.utils.signals import EXIT_CODES, Stopped, expect_repeated_signals, on_signal, stop

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Seconds after which the other processes are asked to end, and then killed: once a process has
# failed, and once it has ended because of a signal. In the second case they may be saving.
AFTER_FAILURE, AFTER_SIGNAL = (0, 10), (10, 300)


def launch(
    main: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Start processes as Detectron2's ``launch`` does, with its arguments, on CPUs without GPUs.

    Under torchrun this process is already one of several, and joins them. A signal is passed on to
    all processes that were started; when one fails, the others are ended.

    Raises:
        InputError: if the arguments do not fit one another, torchrun or the machine.
        Stopped: if the processes ended because of a signal.
        multiprocessing.ProcessException: if a process failed.
    """
    world_size = num_gpus_per_machine * num_machines
    if all(name in os.environ for name in TORCHRUN):
        if world_size > 1:
            raise InputError(
                "torchrun has started the processes of this run; leave out --num-gpus and "
                "--num-machines, or start it without torchrun"
            )
        _run_under_torchrun(main, args)
        return
    if world_size <= 1:
        with on_signal(stop):
            main(*args)
        return
    if not torch.cuda.is_available():
        words = f"No GPU is available: starting {num_gpus_per_machine} processes on the CPU"
        logging.getLogger(__name__).warning(words)
    if dist_url == "auto":
        if num_machines > 1:
            raise InputError("several machines need --dist-url tcp://HOST:PORT of the first one")
        dist_url = f"tcp://127.0.0.1:{get_free_port()}"
    arguments = (main, num_gpus_per_machine, world_size, machine_rank, dist_url, args)
    _spawn(arguments, num_gpus_per_machine)


def run_command(main: Callable, parser: argparse.ArgumentParser, advice: str = "") -> None:
    """Launch ``main(args)`` for a command line; an expected error ends it with one sentence.

    Args:
        main: it takes the parsed arguments.
        parser: one of Detectron2's ``default_argument_parser``.
        advice: what to do if a process was killed.
    """
    parser.set_defaults(dist_url="auto")  # Detectron2's is the same for all runs of a user
    args = parser.parse_args()
    machines = {"num_machines": args.num_machines, "machine_rank": args.machine_rank}
    try:
        launch(main, args.num_gpus, **machines, dist_url=args.dist_url, args=(args,))
    except (InputError, ProcessRaisedException) as error:
        if (sentence := input_error_of(error)) is None:
            raise
        sys.exit(f"{parser.prog}: {sentence}")
    except ProcessExitedException as error:  # killed, perhaps because memory ran out
        sys.exit(f"{parser.prog}: {error}; the others were ended{advice}")


def is_restarted() -> bool:
    """Return whether torchrun has started a process of this run again, after one failed.

    All processes have to call it: the nodes count their restarts separately.
    """
    return any(comm.all_gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))


def _run_under_torchrun(main: Callable, args: tuple) -> None:
    rank, world_size, local_rank = (int(os.environ[name]) for name in TORCHRUN[:3])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    expect_repeated_signals()
    with on_signal(stop):
        if world_size > 1:
            store = _fresh_store(rank, world_size)
            _join_processes(rank, world_size, local_rank, local_size, store=store)
        main(*args)


def _fresh_store(rank: int, world_size: int) -> dist.Store:
    """Return a store without the entries of earlier starts.

    torchrun keeps one over its restarts, and with it the addresses of processes that have died.
    Each process asks the first one, by a name that it has just made up, for a prefix.
    """
    store, _, _ = next(rendezvous("env://"))
    store.set_timeout(DEFAULT_TIMEOUT)
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"msad_kd/asks/{rank}", name)
        name = store.get(f"msad_kd/answer/{name}").decode()
        store.add(f"msad_kd/answered/{name}", 1)
        return dist.PrefixStore(name, store)
    asking = [f"msad_kd/asks/{other}" for other in range(1, world_size)]
    while store.add(f"msad_kd/answered/{name}", 0) < len(asking):
        for key in asking:
            if store.check([key]):
                store.set(f"msad_kd/answer/{store.get(key).decode()}", name)
        time.sleep(0.1)
    return dist.PrefixStore(name, store)


def _worker(local_rank, main, local_size, world_size, machine_rank, dist_url, args):
    # Should the launcher be killed, the kernel sends SIGINT, as torch has asked it to.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    expect_repeated_signals()
    with on_signal(stop):
        rank = machine_rank * local_size + local_rank
        _join_processes(rank, world_size, local_rank, local_size, init_method=dist_url)
        main(*args)


def _join_processes(rank, world_size, local_rank, local_size, **where):
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and local_size > gpus:
        raise InputError(f"{local_size} processes need as many GPUs, and this machine has {gpus}")
    if world_size % local_size:
        words = f"{world_size} processes are not the same number on every machine"
        raise InputError(f"{words} ({local_size} on this one); start as many on each")
    if gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        **where,
        world_size=world_size,
        rank=rank,
        timeout=DEFAULT_TIMEOUT,
    )
    create_local_process_group(local_size)
    comm.synchronize()


def _spawn(arguments: tuple, count: int) -> None:
    """Start processes and wait for their end."""
    processes, received = [], []

    def pass_on(number):
        received.append(number)
        for process in processes:
            process.terminate()

    def kill(number):
        for process in processes:
            process.kill()

    with on_signal(pass_on, again=kill):
        context = multiprocessing.spawn(_worker, arguments, nprocs=count, join=False)
        processes += context.processes
        if received:
            pass_on(received[0])
        failed = _wait(processes, received)
    if failed is None:
        return
    code = processes[failed].exitcode
    if code in EXIT_CODES or (received and code < 0):
        raise Stopped(received[0] if received else code - 128)
    context.sentinels = {s: i for s, i in context.sentinels.items() if i == failed}
    context.join()  # raises the error of this process


def _wait(processes: list, received: list[int]) -> int | None:
    """Wait until all processes have ended, and return the number of the first that failed."""
    failed, since, asked = None, 0.0, False
    while alive := [process for process in processes if process.is_alive()]:
        codes = [process.exitcode for process in processes]
        if failed is None and any(codes):
            failed, since = next(i for i, code in enumerate(codes) if code), time.monotonic()
        if failed is not None:
            ask, kill = AFTER_SIGNAL if codes[failed] in EXIT_CODES else AFTER_FAILURE
            waited = time.monotonic() - since
            if waited >= kill:
                for process in alive:
                    process.kill()
            elif waited >= ask and not (asked or received):  # a second signal would not let it save
                asked = True
                for process in alive:
                    process.terminate()
        connection.wait([p.sentinel for p in alive], None if failed is None else 0.5)
    codes = [process.exitcode for process in processes]
    return failed if failed is not None else next((i for i, c in enumerate(codes) if c), None)
