"""Values of `--objective.X`: the options of all objectives, each refused by the objectives that lack it."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from limbeck.storage_schemas.command_line import Config
from limbeck.trainer.objectives.kind import Kind, Options
from limbeck.trainer.objectives.table import OBJECTIVES


class _Chosen(Config):
    """What is fitted."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: str = "knowledge"

    @model_validator(mode="after")
    def _check(self) -> "_Chosen":
        for option in self._given().keys() - self.kind.options.model_fields.keys():
            raise ValueError(
                f"objective.{option} means nothing to {self.name}; it belongs to {', '.join(_has(option))}"
            )
        try:
            _ = self.options
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    @property
    def kind(self) -> Kind[Any]:
        return OBJECTIVES[self.name]

    @property
    def options(self) -> Options:
        """The objective's own options, with its defaults."""
        options: Options = self.kind.options.model_validate(self._given())
        return options

    def filled(self) -> "_Chosen":
        """A copy with the objective's own defaults in place."""
        return self.model_copy(update=dict(self.options))

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self if name != "name" and value is not None}


def _has(option: str) -> list[str]:
    return [name for name, kind in OBJECTIVES.items() if option in kind.options.model_fields]


def _flags() -> dict[str, Any]:
    """Every option of every objective as a field that may be left out."""
    found: dict[str, dict[str, FieldInfo]] = {}
    for name, kind in OBJECTIVES.items():
        for option, info in kind.options.model_fields.items():
            found.setdefault(option, {})[name] = info
    return {option: _flag(infos) for option, infos in found.items()}


def _flag(infos: dict[str, FieldInfo]) -> Any:
    info = next(iter(infos.values()))
    owners, defaults = ", ".join(infos), {name: it.default for name, it in infos.items() if it.default is not None}
    if len(set(defaults.values())) == 1 and len(defaults) == len(infos):
        default = f" Default: {_word(info.default)}."
    else:
        default = f" Default: {', '.join(f'{name} {_word(it)}' for name, it in defaults.items())}." if defaults else ""
    annotation: Any = info.annotation
    for constraint in info.metadata:
        annotation = Annotated[annotation, constraint]
    if type(None) not in get_args(annotation):
        annotation = annotation | None
    return annotation, Field(None, description=f"{info.description} For {owners}.{default}")


def _word(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _makes() -> str:
    """What to fit: a student of one step (knowledge), a teacher (denoising)."""
    found: dict[str, list[str]] = {}
    for name, kind in OBJECTIVES.items():
        found.setdefault(kind.makes, []).append(name)
    return "What to fit: " + "; ".join(f"{makes} ({', '.join(names)})" for makes, names in found.items()) + "."


if TYPE_CHECKING:
    ObjectiveConfig = _Chosen
else:
    ObjectiveConfig = create_model(
        "ObjectiveConfig",
        __base__=_Chosen,
        __doc__=_Chosen.__doc__,
        name=(Literal[tuple(OBJECTIVES)], Field("knowledge", description=_makes())),
        **_flags(),
    )
