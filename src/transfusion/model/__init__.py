"""The network: embeddings, attention, blocks, patch encoder and decoder, text head."""

from transfusion.model.chameleon import Chameleon
from transfusion.model.transformer import ModelOutput, Transfusion

__all__ = ["Chameleon", "ModelOutput", "Transfusion"]
