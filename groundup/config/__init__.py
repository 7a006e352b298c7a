"""What can I set? A recipe: one YAML file, validated, with unknown keys refused and the likely key named.

`recipe.py` reads it; the sections of all stages are in `sections.py`, those of one stage in files of its name.
"""

from groundup.config.distill import DistillConfig
from groundup.config.preference import PreferenceConfig
from groundup.config.recipe import Recipe, build_recipe, closest, known_keys, load_recipe
from groundup.config.reward import RewardConfig
from groundup.config.rl import RLConfig
from groundup.config.sections import AdaptConfig, EvalConfig, LogConfig, OptimConfig, SourceConfig, TrainConfig

__all__ = [
    "AdaptConfig",
    "DistillConfig",
    "EvalConfig",
    "LogConfig",
    "OptimConfig",
    "PreferenceConfig",
    "RLConfig",
    "Recipe",
    "RewardConfig",
    "SourceConfig",
    "TrainConfig",
    "build_recipe",
    "closest",
    "known_keys",
    "load_recipe",
]
