"""Fake tensors whose results are remembered, for the fake GPU and for simulations: thousands of layers are
mostly alike."""
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves


class Fake(FakeTensorMode):
    """Fake tensors, with a memory of their own for what operations returned. It saves PyTorch's half of the
    time: that one tells tensors apart by their place in a storage, too, so that each parameter and each
    gradient in a flat vector is one that it has not seen before."""
    known = {}                                              # `key` of an operation -> `recipe` of its result

    def __deepcopy__(self, memo):
        return self                                         # copies of fake tensors stay in the one mode

    def _cached_dispatch_impl(self, op, types, args, kwargs):
        told = [op, torch.get_default_dtype(), *args, *kwargs.items()]
        if op is torch.ops.aten.as_strided.default:         # the one that is told a place in the storage
            told += [args[0].storage_offset(), args[0].untyped_storage().nbytes()]
        key, inputs = self.key(told), (*args, *kwargs.values())
        if key is not None and key not in self.known:
            out = self._dispatch_impl(op, types, args, kwargs)
            self.known[key] = self.recipe(out, inputs)
            return out
        recipe = self.known[key] if key else None
        if recipe is None:
            return super()._cached_dispatch_impl(op, types, args, kwargs)
        return self.make(recipe, inputs)

    def key(self, values) -> tuple | None:
        """What shape, strides, type and device of a result depend on; None: not on this alone."""
        parts = []
        for x in values:
            if isinstance(x, torch.Tensor):
                if type(x) is not FakeTensor or x.fake_mode is not self or x.constant is not None:
                    return None
                parts.append((x.shape, x.stride(), x.dtype, x.fake_device))
            elif isinstance(x, (list, tuple)):
                inner = self.key(x)
                if inner is None:
                    return None
                parts.append(inner)
            else:
                parts.append((type(x), x))                  # 1, 1.0 and True are equal, results are not
        return tuple(parts)

    def recipe(self, out, inputs: tuple) -> tuple | None:
        """How `make` comes to such a result; None: it cannot."""
        if isinstance(out, (list, tuple)):
            inner = [self.recipe(x, inputs) for x in out]
            return None if None in inner else ("several", inner)
        if out is None or isinstance(out, int):
            return "number", out
        if type(out) is not FakeTensor or out.constant is not None or out.requires_grad:
            return None

        # an input, or a view of one
        storage, place = out.untyped_storage(), out.storage_offset()
        for i, x in enumerate(inputs):
            if x is out:
                return "input", i
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == storage._cdata:
                return "view", (i, out.dtype, place - x.storage_offset(), out.shape, out.stride())
        tensors = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        if any(x.untyped_storage()._cdata == storage._cdata for x in tensors):
            return None

        # a new one, that fills its storage
        told = out.shape, out.stride(), out.dtype, out.fake_device
        made = self.make(("new", told), inputs)
        whole = place == 0 and made.untyped_storage().nbytes() == storage.nbytes()
        return ("new", told) if whole else None

    def make(self, recipe: tuple, inputs: tuple):
        kind, told = recipe
        if kind == "number":
            return told
        if kind == "several":
            return tuple(self.make(part, inputs) for part in told)
        if kind == "input":
            return inputs[told]
        if kind == "view":
            i, dtype, place, shape, strides = told
            device, made = inputs[i].fake_device, torch.empty(0, dtype=dtype, device="meta")
            made.set_(inputs[i].untyped_storage(), inputs[i].storage_offset() + place, shape, strides)
        else:
            shape, strides, dtype, device = told
            made = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        return FakeTensor(self, made, device)


def device_of(x: FakeTensor) -> torch.device:
    """What Fake answers to `x.device`, which is half of all that modes are asked."""
    return torch.device("meta") if x.fake_mode.in_kernel_invocation else x.fake_device
