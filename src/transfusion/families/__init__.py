"""Families of models: one object in one table holds all that differs between them."""

from transfusion.families.chameleon import CHAMELEON
from transfusion.families.family import Family, ImageDrawing
from transfusion.families.transfusion import TRANSFUSION

# By `model.family`. What a configuration must say for each is in `config.families`.
FAMILIES: dict[str, Family] = {"transfusion": TRANSFUSION, "chameleon": CHAMELEON}

__all__ = ["FAMILIES", "Family", "ImageDrawing"]
