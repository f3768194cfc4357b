"""Score identity distillation: the squared difference of two scores, less the part that a critic can't say."""

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.kind import Given, Kind, Stage
from limbeck.trainer.objectives.matching import FIT, Matching, MatchingOptions, answers, matching_stage, size
from limbeck.trainer.stream import Batch


@dataclass(frozen=True, kw_only=True)
class ScoreIdentity(Matching):
    """(f - g) . [(f - x) - a (f - g)] / sg(mean|x - f|), f the teacher's answer at x_t and g the critic's.

    A mean over numbers. The gradient flows through x and through both networks' inputs, but not to the critic's own
    weights, which follow the student's: so it is a multiple of that of E|f - g|^2, sigma_t^4/alpha_t^2 times Fisher's
    divergence, only at a = 1/2, half of it. The paper's a, 1 and 1.2, lean against an inexact critic. Zhou et al. 2024.
    """

    a: float = 1.2

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        x = self.sample(networks, batch)
        f, g = answers(networks, batch, self.asked(networks, batch, x))
        return ((f - g) * ((f - x) - self.a * (f - g)) / size(x - f)).mean()


class SidOptions(MatchingOptions):
    """Options of sid."""

    a: float = Field(1.2, description="Alpha of the loss, 1.0 or 1.2.")


def _stages(options: SidOptions, given: Given) -> tuple[Stage, ...]:
    return (matching_stage("sid", ScoreIdentity(**options.shared(given), a=options.a)),)


KIND = Kind(
    options=SidOptions,
    stages=_stages,
    makes="a student of student_steps",
    learns="the teacher's distribution by score identities (Zhou et al. 2024)",
    reads="noise",
    samples="1 jump, or n with fresh noise",
    fit=FIT,
    has_critic=True,
    through_teacher=True,
    judged_by_holdout=False,
)
