"""RoI heads of a user's own, by which a process disturbs its run.

The environment variable DISTURB says when and how: the process's rank, the iteration, and

    SIGTERM, SIGKILL, ...   the signal that it gets; "SIGTERM launcher": the launcher gets it
    NAN, RAISE              it spoils a weight; it raises what Detectron2's RPN raises
    EVALUATION              all wait in the evaluation, in which this one gets SIGTERM

Processes that have begun to train leave a file named after them in the folder PIDS, if it is set.
"""

import os
import signal
import time

from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

RANK, ITERATION, WHAT, *LAUNCHER = os.environ.get("DISTURB", "0 -1 -").split()
RESTARTED = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
done = []  # once a step, which calls the heads again for the images without labels


@ROI_HEADS_REGISTRY.register()
class UsersHeads(StandardROIHeads):
    def forward(self, *args):
        mine = comm.get_rank() == int(RANK) and not RESTARTED
        if not self.training and WHAT == "EVALUATION":
            if mine:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
        elif self.training:
            iteration = get_event_storage().iter
            if iteration == 0 and "PIDS" in os.environ:
                open(os.path.join(os.environ["PIDS"], str(os.getpid())), "w").close()
            if mine and iteration == int(ITERATION) and not done:
                done.append(iteration)
                self.disturb()
        return super().forward(*args)

    def disturb(self):
        if WHAT == "NAN":
            self.mask_head.predictor.bias.data.fill_(float("nan"))
        elif WHAT == "RAISE":
            raise FloatingPointError("loss_mask")
        elif WHAT != "EVALUATION":
            os.kill(os.getppid() if LAUNCHER else os.getpid(), getattr(signal, WHAT))
