"""The sides of tools/benchmark.py: models that train a step, whose parts are timed."""

import ctypes
import os
import re
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from benchmark_report import PARTS
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from msad_kd import KDTrainer, TwoResolutionMapper
from msad_kd.distill.teacher import Teacher
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.evaluation.cost import counting_flops
from msad_kd.utils.replaced import replaced
from msad_kd.utils.seed import seed_all

MAPPINGS = 3  # mapping takes so little that it is repeated
SQUARE = 2048  # rows of the matrices whose product shows what the machine can do
ITERATION = 10**6  # past every warm-up; no diagnostics are due


class PlainTeacher(Teacher):
    """A teacher that computes pyramids with the backbone as it was loaded, in fp32."""

    def prepared(self):
        """Return the backbone itself."""
        self.amp = ""
        return self.model.backbone


def measure_product(device, clock):
    """Return the GFLOP/s of a product of two fp32 matrices."""
    matrix = torch.ones(SQUARE, SQUARE, device=device)
    clock.parts.clear()
    with clock.part("product"):
        matrix @ matrix
    return 2 * SQUARE**3 / clock.parts["product"] / 1e9


class Clock:
    """Adds up the seconds of parts; it waits for the GPU before it looks."""

    def __init__(self, cuda, cpu_time):
        self.cuda, self.parts = cuda, defaultdict(float)
        self.now = time.process_time if cpu_time else time.perf_counter

    @contextmanager
    def part(self, name):
        """Time the block."""
        start = self.read()
        yield
        self.parts[name] += self.read() - start

    def read(self):
        """Return the time in seconds."""
        if self.cuda:
            torch.cuda.synchronize()
        return self.now()

    def timing(self, target, method, name):
        """Let the calls of a method be timed for a while."""
        function = getattr(target, method)

        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return replaced(target, **{method: timed})

    def start_memory(self):
        """Watch the peak memory from now on; return the memory in use, in bytes."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)  # gives back what was freed, which the step would use unnoticed
            Path("/proc/self/clear_refs").write_text("5")  # Linux then starts VmHWM anew
        return self.peak_memory()

    def peak_memory(self):
        """Return the peak memory in bytes, of CUDA or of the process; 0 where it is not known."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
        return 1024 * int(found[1]) if found else 0


class Side:
    """A model in training: stock, or a student of a teacher of the class ``teacher``."""

    def __init__(self, cfg, teacher=None):
        seed_all(0)
        self.cfg, self.teacher, self.model = cfg, None, build_model(cfg).train()
        self.mapper = DatasetMapper(cfg, True)
        if teacher:
            self.mapper = TwoResolutionMapper(cfg, True, frame="lr")
            spec = TeacherSpec.from_config(cfg)
            keys = {"branch": spec.branch, "scale": spec.cfg.KD.SCALE, "amp": spec.amp}
            self.teacher = teacher(build_model(spec.cfg), **keys)
            self.model.set_teacher(self.teacher)
        self.optimizer = KDTrainer.build_optimizer(cfg, self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.rounds, self.memory = [], {}

    def step(self, dicts, seed, clock):
        """Train a step, and append the seconds of its parts to ``rounds``."""
        model, parts = self.model, clock.parts
        parts.clear()
        for _ in range(MAPPINGS):
            seed_all(seed)
            with clock.part("mapper"):
                batch = [self.mapper(x) for x in dicts]
        parts["mapper"] /= MAPPINGS
        with EventStorage(ITERATION), ExitStack() as timings, clock.part("student forward"):
            if self.teacher:
                timings.enter_context(clock.timing(self.teacher, "pyramid", "teacher"))
                for each in (model.distiller, model.roi_distiller, model.dense_distiller):
                    timings.enter_context(clock.timing(each, "forward", "losses"))
            loss = sum(model(batch).values())
        parts["student forward"] -= parts["teacher"] + parts["losses"]
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.rounds.append({part: parts[part] for part in PARTS})

    def count_teacher(self, dicts):
        """Return the GFLOP of the teacher's pyramid, each multiply-add being two operations."""
        batch = [self.mapper(x) for x in dicts]
        padded = tuple(self.model.preprocess_image(batch).tensor.shape[-2:])
        with counting_flops() as counter:
            self.teacher.pyramid(batch, padded)
        return counter.get_total_flops() / 1e9

    def measure_memory(self, dicts, seed, clock):
        """Train a step that counts for memory alone, in bytes: held before it, and its own peak."""
        in_use = clock.start_memory()
        self.step(dicts, seed, clock)
        self.memory = {"held": self.held(), "step": clock.peak_memory() - in_use}
        self.rounds.pop()

    def held(self):
        """Return the bytes of the weights of student and teacher, and of the optimizer's state."""
        models = [self.model]
        if self.teacher:
            models += [self.teacher.model, self.teacher.prepared()]
        tensors = [x for model in models for x in (*model.parameters(), *model.buffers())]
        state = [x for values in self.optimizer.state.values() for x in values.values()]
        tensors += filter(torch.is_tensor, state)
        storages = [x.untyped_storage() for x in tensors]
        return sum({x.data_ptr(): x.nbytes() for x in storages}.values())
