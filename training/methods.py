"""The methods by name: builds the network that a run's settings ask for.

Called by `fit`, `detector` and `compare`; knows no data and no training.
"""

from training.config import NetworkConfig
from training.dskd import DualStudent
from training.logicrd import LogicRD, Switches
from training.rd import ReverseDistillation
from training.teacher import AnyTeacher

Network = ReverseDistillation | DualStudent | LogicRD


def build(config: NetworkConfig, teacher: AnyTeacher) -> Network:
    """A network with untrained weights around `teacher`, which it freezes and shares."""
    if config.method == "rd":
        return ReverseDistillation(teacher, config.width, config.image_size)
    if config.method == "dskd":
        return DualStudent(teacher, config.width, config.image_size)
    switches = Switches(gse=config.gse, fcp=config.fcp, nii=config.nii)
    return LogicRD(teacher, config.width, config.image_size, switches)
