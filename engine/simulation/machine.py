"""``Machine``: what a simulated engine runs on: how long its steps take, and how large its batches and cache are.

A machine is a JSON file; those in ``engine/data/machines`` go by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from pagedattn.engine.simulation.step_time import Fitted, FixedRate, Roofline, StepTimeModel

MODELS = {"fixed-rate": FixedRate, "roofline": Roofline, "fitted": Fitted}


@dataclass(frozen=True)
class Machine:
    """``about`` says in a sentence where the numbers are from."""

    name: str
    about: str
    step_time: StepTimeModel
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


def machine_names() -> list[str]:
    folder = resources.files("pagedattn.engine").joinpath("data", "machines")
    return sorted(path.name.removesuffix(".json") for path in folder.iterdir() if path.name.endswith(".json"))


def load_machine(name_or_path: str) -> Machine:
    """A machine by name, or from a JSON file. Raises ValueError that says what is wrong with it."""
    if name_or_path in machine_names():
        folder = resources.files("pagedattn.engine").joinpath("data", "machines")
        text = folder.joinpath(f"{name_or_path}.json").read_text(encoding="utf-8")
    elif Path(name_or_path).suffix == ".json":
        text = Path(name_or_path).read_text(encoding="utf-8")
    else:
        known = ", ".join(machine_names())
        raise ValueError(f"machine {name_or_path!r} is not known: it must be a .json file or one of {known}")
    try:
        return parse_machine(Path(name_or_path).stem, json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"machine {name_or_path}: {reason}") from None


def parse_machine(name: str, document: dict[str, Any]) -> Machine:
    """From the JSON's content: about, kind, step_time (the fields of that kind's class) and the sizes."""
    if not isinstance(document, dict):
        raise ValueError("it must be a JSON object")
    kind = document["kind"]
    if kind not in MODELS:
        raise ValueError(f"kind={kind!r} is not known: it must be one of {', '.join(MODELS)}")
    model = MODELS[kind]
    allowed = {field.name for field in fields(model)}
    unknown = set(document["step_time"]) - allowed
    if unknown:
        raise ValueError(f"step_time has {', '.join(sorted(unknown))}: allowed are {', '.join(sorted(allowed))}")
    sizes = {key: document[key] for key in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")}
    return Machine(name, document["about"], model(**document["step_time"]), **sizes)
