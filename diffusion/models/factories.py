"""Networks of your own as teachers: `--teacher python:MODULE:FACTORY` takes what these functions return.

    def teacher():
        return flow(load_my_network(), sample_shape=(3, 32, 32), num_classes=10)

A network is called network(x [B, *sample_shape], time [B]), with num_classes also network(x, time, label int64 [B]),
where the label num_classes means no class. It answers [B, *sample_shape].
"""

from collections.abc import Sequence

from torch import Tensor, nn

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.prediction import EDM, PREDICTIONS, Prediction, Velocity
from limbeck.diffusion.process import VE, DiscreteVP, Process, RectifiedFlow


def flow(
    network: nn.Module,
    *,
    sample_shape: Sequence[int],
    num_classes: int | None = None,
    data_at: int = 0,
    time_scale: float = 1.0,
) -> Denoiser:
    """A flow-matching network, which predicts dx/dt on x_t = (1 - t) x_0 + t eps. Lipman et al. 2023.

    data_at: the network's own time of data. At 1 it knows x = s x_0 + (1 - s) eps and predicts dx/ds. time_scale: it
    is shown its time times this.
    """
    if data_at not in (0, 1):
        raise ValueError(f"data_at {data_at}: give the time at which the network has data, 0 or 1")
    called = _Called(network, num_classes, time_scale=time_scale, reversed=data_at == 1)
    return _denoiser(called, RectifiedFlow(), Velocity(), sample_shape, num_classes)


def edm(
    network: nn.Module,
    *,
    sample_shape: Sequence[int],
    num_classes: int | None = None,
    sigma_data: float = 0.5,
    sigma_max: float = 80.0,
) -> Denoiser:
    """EDM's inner network F(c_in x, log(sigma)/4), preconditioned here. Karras et al. 2022, table 1.

    A network that is preconditioned already, D(x, sigma), is x_0 itself: return a module that calls it.
    """
    return _denoiser(_Called(network, num_classes), VE(sigma_max), EDM(sigma_data), sample_shape, num_classes)


def table(
    network: nn.Module,
    *,
    betas: Sequence[float],
    sample_shape: Sequence[int],
    num_classes: int | None = None,
    prediction: str = "epsilon",
) -> Denoiser:
    """A network of a table of betas, which is shown timesteps 0 .. len(betas) - 1. Ho et al. 2020.

    prediction: epsilon, sample or v_prediction.
    """
    if prediction not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"prediction {prediction!r}: give epsilon, sample or v_prediction")
    process = DiscreteVP(tuple(map(float, betas)))
    return _denoiser(_Called(network, num_classes), process, PREDICTIONS[prediction](), sample_shape, num_classes)


class _Called(nn.Module):
    """A network with the arguments that it takes."""

    def __init__(
        self, network: nn.Module, num_classes: int | None, *, time_scale: float = 1.0, reversed: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.takes_label = num_classes is not None
        self.time_scale, self.reversed = time_scale, reversed

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        time = self.time_scale * (1 - time if self.reversed else time)
        answer: Tensor = self.network(x, time, condition) if self.takes_label else self.network(x, time)
        return -answer if self.reversed else answer


class _Shaped(Denoiser):
    """A denoiser that says what its samples are, as every teacher from a factory does."""

    sample_shape: tuple[int, ...]


def _denoiser(
    called: _Called, process: Process, prediction: Prediction, sample_shape: Sequence[int], num_classes: int | None
) -> Denoiser:
    denoiser = _Shaped(called, process, prediction, num_classes)
    denoiser.sample_shape = tuple(sample_shape)
    return denoiser
