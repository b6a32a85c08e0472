"""Layers for a CPU, equal to the textbook's of model.py but for rounding: faster, or holding less in memory.

Work in place, or on a part at a time, is for passes without a graph, which would keep everything anyway.
"""
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.weights import FORMATS

TOKENS = 4096                               # that go through a feed-forward layer at a time
LARGE = 2 ** 24                             # numbers of an image whose copies would be the most that is held
ROWS = 16                                   # of such an image that are normalised at a time


def speed_up(layers: dict[type, type], *networks: nn.Module) -> None:
    """Gives layers of networks on a CPU an equal, faster forward, and weights the activations' memory format.

    layers: {class of the textbook: InParts, ByRows or Folded}; SiLU and Conv3d are known. Layers keep their
    parameters and names, and are still of their class."""
    fast = {layer: type(mixin.__name__ + layer.__name__, (mixin, layer), {})
            for layer, mixin in ({nn.SiLU: InPlace, nn.Conv3d: TimeConv} | layers).items()}
    for network in networks:
        if any(p.device.type != "cpu" for p in network.parameters()):
            continue
        for layer in network.modules():
            layer.__class__ = fast.get(type(layer), type(layer))
        for p in network.parameters():
            p.data = p.data.contiguous(memory_format=FORMATS.get(p.dim(), torch.contiguous_format))


class InPlace:
    """SiLU in the memory of x, which the norm or linear layer before it made for it alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


class TimeConv:
    """A convolution along T alone, as an image convolution over (T, H*W): torch takes a 3x1x1 kernel, by its
    last two sizes, for pointwise, and runs it through copies of its input, at half the speed."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.kernel_size[1:] == (1, 1), self
        h = F.conv2d(x.flatten(3), self.weight.flatten(3), self.bias, padding=self.padding[:2])
        return h.unflatten(3, x.shape[3:])


class InParts:
    """A layer of tokens (B, L, D), some of them at a time."""

    def forward(self, x: Tensor) -> Tensor:
        layer = super().forward
        if torch.is_grad_enabled():
            return layer(x)
        return torch.cat([layer(tokens) for tokens in x.split(TOKENS, dim=1)], dim=1)


class ByRows:
    """A VAEResBlock that takes large images by rows."""

    def forward(self, x: Tensor) -> Tensor:
        if x[0].numel() < LARGE or x.shape[2] % ROWS or torch.is_grad_enabled():
            return super().forward(x)
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = norm_silu_conv(self.norm2, self.conv2, h, out=h)
        for rows, h_rows in zip(x.split(ROWS, dim=2), h.split(ROWS, dim=2), strict=True):
            h_rows += self.nin_shortcut(rows)
        return h


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, out: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))) of a 3x3 convolution, by rows. out: where the result goes; it may be x itself."""
    N, _, H, W = x.shape
    scale, shift = scale_and_shift(norm, x)
    if out is None:
        out = x.new_empty(N, H, W, conv.out_channels).permute(0, 3, 1, 2)

    window = x.new_zeros(N, ROWS + 2, W, x.shape[1]).permute(0, 3, 1, 2)        # and a row above and below
    for top in range(0, H, ROWS):
        window[:, :, 0] = window[:, :, ROWS]                # the last row before these; zero above the first
        rows = x[:, :, top:top + ROWS + 1]
        inside = window[:, :, 1:1 + rows.shape[2]]
        F.silu(torch.addcmul(shift, rows, scale, out=inside), inplace=True)
        if rows.shape[2] == ROWS:                           # zero below the last
            window[:, :, -1] = 0
        out[:, :, top:top + ROWS] = F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))
    return out


def scale_and_shift(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """A group norm as a product and a sum: x (N, C, H, W) -> (N, C, 1, 1) twice, in float32."""
    groups = x.unflatten(1, (norm.num_groups, -1))
    moments = [torch.var_mean(rows.float(), (2, 3, 4), correction=0) for rows in groups.split(ROWS, dim=3)]
    variances, means = map(torch.stack, zip(*moments))      # of equally many rows each
    variance = variances.mean(0) + means.var(0, correction=0)

    size = norm.num_channels // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(size, dim=1) * norm.weight
    shift = norm.bias - means.mean(0).repeat_interleave(size, dim=1) * scale
    return scale[..., None, None], shift[..., None, None]


class Folded:
    """Upsample with 4/9 of the products, and without the doubled image, nine of whose pixels are four of x:
    even and odd rows and columns are four 2x2 convolutions, whose weights are sums of those that meet."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        N, C, H, W = x.shape
        fold = x.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])   # (a, b + c) and (a + b, c)
        kernels = torch.einsum("pik,qjl,abkl->pqabij", fold, fold, self.conv.weight)
        out = x.new_empty(N, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
        for i, j in product((0, 1), repeat=2):
            corner = (..., slice(i, i + H), slice(j, j + W))                    # of (H + 1, W + 1)
            out[:, :, i::2, j::2] = F.conv2d(x, kernels[i, j], self.conv.bias, padding=1)[corner]
        return out
