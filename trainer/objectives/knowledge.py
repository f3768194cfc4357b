"""Knowledge distillation: one jump from the noise to the teacher's output."""

from dataclasses import dataclass

from torch import Tensor

from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.conditioning import conditioning
from limbeck.trainer.objectives.distances import Distance, DistanceOptions, files_read, l2
from limbeck.trainer.objectives.kind import Given, Kind, Stage
from limbeck.trainer.objectives.stored import ends, times_on
from limbeck.trainer.stream import Batch


@dataclass(frozen=True)
class Knowledge:
    """E d( G(x_T, T, 0), output ). Luhman & Luhman 2021, eq. 6. times: (T, 0)."""

    times: tuple[float, ...]
    distance: Distance = l2
    columns: tuple[str, ...] = ("noise", "output")
    num_uniforms: int = 0

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        T, zero = times_on(batch.positions.device, self.times)
        labels, guidance = conditioning(networks.student, batch)
        guess = networks.student.jump(batch.states["noise"], T, zero, labels, guidance=guidance)
        return self.distance(guess, batch.states["output"]).mean()


def _stages(options: DistanceOptions, given: Given) -> tuple[Stage, ...]:
    times = ends(given.stored.recipe)
    objective = Knowledge(times, options.make_distance(given.sample_shape))
    return (Stage("knowledge", objective, times, reads=files_read(objective.distance)),)


KIND = Kind(
    options=DistanceOptions,
    stages=_stages,
    makes="a student of one step",
    learns="the output from the noise (Luhman & Luhman 2021)",
    reads="noise, output",
    samples="1 jump",
)
