"""How a scenario names its machine and its kernel: by name, or as a change of a shipped one."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, with_config
from typing_extensions import TypedDict  # typing's own only from Python 3.12 on

from simkvm.scenario.fields import STRICT, FrozenDict, refuse, shown


def _number(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise refuse(f"expects a number, not {shown(value)}")
    return value


def _name_or_change(value: object) -> str | None:
    return "<name>" if isinstance(value, str) else "<change>" if isinstance(value, dict) else None


@with_config(STRICT)
class MachineChange(TypedDict):
    """A machine with some of its parameters changed."""

    base: Annotated[
        str,
        Field(description="Its name (`simkvm machines`), or the path of a profile, ./mine.toml."),
    ]
    set: Annotated[
        dict[str, Annotated[bool | float | str, BeforeValidator(_number)]],
        Field(
            default={},
            description="Parameters to change, each in the unit of its name (times also as "
            "'60 ns'); cores, nodes, ghz and the flags hw_af, tlbirange, fwb too. More nodes than "
            "one need c2c_remote_ns.",
        ),
        AfterValidator(FrozenDict),
    ]


@with_config(STRICT)
class KernelChange(TypedDict):
    """A shipped kernel variant with some of its policies changed."""

    base: Annotated[str, Field(description="Name of the kernel variant (`simkvm kernels`).")]
    set: Annotated[
        dict[str, str],
        Field(
            default={},
            description="Policies to change, for instance table_free: put_page_rcu.",
        ),
        AfterValidator(FrozenDict),
    ]


MachineRef = Annotated[
    Annotated[str, Tag("<name>")]
    | Annotated[MachineChange, AfterValidator(FrozenDict), Tag("<change>")],
    Discriminator(
        _name_or_change,
        custom_error_type="simkvm_reference",
        custom_error_message="expects the name of a machine, or a mapping with base and set",
    ),
]
KernelRef = Annotated[
    Annotated[str, Tag("<name>")]
    | Annotated[KernelChange, AfterValidator(FrozenDict), Tag("<change>")],
    Discriminator(
        _name_or_change,
        custom_error_type="simkvm_reference",
        custom_error_message="expects the name of a kernel, or a mapping with base and set",
    ),
]
