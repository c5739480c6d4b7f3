"""Configs: one YAML file a run, checked against the frozen dataclass of its experiment."""

import importlib
import os
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import dacite
import yaml

from lib import ROOT

PROFILES = ("smoke", "cpu", "gpu", "paper")


class ConfigError(ValueError):
    """Say in one sentence what is wrong with a config and what to do."""


@dataclass(frozen=True)
class Loaded:
    """A config file after its profile block was laid over its top level."""

    name: str
    profile: str
    experiment: ModuleType
    config: Any
    verdict: list[dict]
    resolved: dict


def current_profile() -> str:
    """Return ``BOOK_PROFILE``, or ``cpu`` where it is unset.

    Raises: ConfigError if the variable holds an unknown profile.
    """
    return _known_profile(os.environ.get("BOOK_PROFILE", "cpu"))


def config_names() -> list[str]:
    """List the names of all configs, sorted."""
    return sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def load_config(name: str, profile: str | None = None) -> Loaded:
    """Read ``configs/<name>.yaml`` for one profile.

    The top level holds the ``cpu`` values; a block named like the profile overrides them.

    Raises: ConfigError if the name, the profile, the experiment or a key is unknown,
    or if a value has the wrong type.
    """
    profile = current_profile() if profile is None else _known_profile(profile)
    path = ROOT / "configs" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(config_names())
        raise ConfigError(f"There is no config named {name!r}; the configs are: {known}.")
    return resolve(name, profile, yaml.safe_load(path.read_text(encoding="utf-8")))


def resolve(name: str, profile: str, raw: dict) -> Loaded:
    """Turn the mapping of a YAML file into a checked config; see :func:`load_config`."""
    raw = dict(raw)
    blocks = {key: raw.pop(key, None) or {} for key in PROFILES}
    verdict = raw.pop("verdict", [])
    kind = raw.pop("experiment", None)
    try:
        experiment = importlib.import_module(f"lib.experiments.{kind}")
    except ModuleNotFoundError as error:
        if error.name != f"lib.experiments.{kind}":
            raise
        known = sorted(p.stem for p in (ROOT / "lib/experiments").glob("[!_]*.py"))
        raise ConfigError(
            f"Config {name!r} asks for experiment {kind!r}; known are {', '.join(known)}."
        ) from None
    values = raw | blocks[profile]
    try:
        config = dacite.from_dict(
            experiment.Config, values, dacite.Config(strict=True, cast=[tuple, float])
        )
    except dacite.UnexpectedDataError as error:
        known = ", ".join(field.name for field in fields(experiment.Config))
        raise ConfigError(
            f"Config {name!r} ({profile}) has the unknown key {', '.join(sorted(error.keys))}; "
            f"experiment {kind!r} knows: {known}."
        ) from None
    except (dacite.DaciteError, TypeError, ValueError) as error:
        raise ConfigError(f"Config {name!r} ({profile}) does not fit {kind!r}: {error}.") from None
    resolved = {"experiment": kind, **values, "verdict": verdict}
    return Loaded(name, profile, experiment, config, verdict, resolved)


def _known_profile(profile: str) -> str:
    if profile not in PROFILES:
        raise ConfigError(f"The profile {profile!r} is unknown; choose one of {PROFILES}.")
    return profile
