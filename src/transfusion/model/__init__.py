"""The network: embeddings, attention, blocks, patch encoder and decoder, text head."""

from transfusion.model.chameleon import Chameleon
from transfusion.model.transformer import ModelOutput, Transfusion

Network = Transfusion | Chameleon
# By `model.family`.
FAMILIES: dict[str, type[Transfusion] | type[Chameleon]] = {
    "transfusion": Transfusion,
    "chameleon": Chameleon,
}

__all__ = ["FAMILIES", "ModelOutput", "Network", "Transfusion"]
