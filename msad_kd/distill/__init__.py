"""Students, their frozen teachers, and the losses between the two."""

from msad_kd.distill.feature_distiller import FeatureDistiller
from msad_kd.distill.roi_distiller import RoIDistiller
from msad_kd.distill.student import DistilledMixin, attach_teacher
from msad_kd.distill.teacher import Teacher
from msad_kd.distill.teacher_spec import TeacherSpec
