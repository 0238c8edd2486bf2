"""A small causal transformer that predicts the next token at each place of a sequence."""

import math

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02


class CausalAttention(nn.Module):
    """Self-attention in which a token sees itself and the tokens before it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Map (B, T, dim) to (B, T, dim); masks that timm's block passes on are not read."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, dim)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).flatten(2))


class CausalTransformer(nn.Module):
    """timm's pre-norm blocks with causal attention, learned positions and an untied head.

    Weights start as those of GPT-2 (Radford et al., 2019): N(0, 0.02^2). Linears that end a
    branch, whose output is added to the block's input, start 1/sqrt(2 depth) times as large.
    Linears have the names of a Vision Transformer's. ValueError if ``num_heads`` does not divide
    ``embed_dim``.
    """

    def __init__(
        self,
        context: int,
        vocabulary: int = 256,
        embed_dim: int = 128,
        depth: int = 6,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"model.embed_dim={embed_dim} cannot be shared by model.num_heads={num_heads}"
            )
        self.grad_checkpointing = False
        self.token_embed = nn.Embedding(vocabulary, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, context, embed_dim))
        blocks = [causal_block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocabulary)
        self.init_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) int64, T at most ``context``, to logits (B, T, vocabulary)."""
        positions = self.pos_embed[:, : tokens.shape[1]]
        x = self.token_embed(tokens) + positions
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.head(self.norm(x))

    def init_weights(self) -> None:
        """Draw all weights anew."""
        branch_std = INIT_STD / math.sqrt(2 * len(self.blocks))
        nn.init.normal_(self.pos_embed, std=INIT_STD)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                ends_branch = name.endswith(("attn.proj", "mlp.fc2"))
                std = branch_std if ends_branch else INIT_STD
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay leaves alone."""
        return {"pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable


def causal_block(dim: int, num_heads: int, mlp_ratio: float) -> Block:
    """Return timm's block of a Vision Transformer, with causal attention."""
    block = Block(dim, num_heads, mlp_ratio)
    block.attn = CausalAttention(dim, num_heads)
    return block
