"""Packed masks: the layout, bit by bit, and back."""

from __future__ import annotations

import pytest
import torch

from bakeout.kernels.packing import pack_mask, packed_width, unpack_mask


@pytest.mark.parametrize("places", [(), (1,), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 21])
def test_bit_j_of_byte_i_is_feature_8i_plus_j_and_the_rest_is_zero(width, places):
    mask = torch.rand((*places, width), generator=torch.Generator().manual_seed(width)) < 0.5
    bits = pack_mask(mask)
    assert bits.dtype == torch.uint8
    assert bits.is_contiguous()
    assert bits.shape == (*places, packed_width(width)) == (*places, (width + 7) // 8)
    rows = zip(mask.reshape(-1, width).tolist(), bits.reshape(-1, packed_width(width)).tolist(), strict=True)
    for features, row in rows:
        assert int.from_bytes(bytes(row), "little") == sum(
            1 << place for place, is_set in enumerate(features) if is_set
        )
    assert torch.equal(unpack_mask(bits, width), mask)


def test_a_mask_of_any_strides_is_packed():
    mask = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(pack_mask(mask.T), pack_mask(mask.T.contiguous()))
    assert not torch.equal(pack_mask(mask.T), pack_mask(~mask.T))


def test_other_dtypes_and_widths_are_refused():
    with pytest.raises(TypeError, match=r"float32, not bool"):
        pack_mask(torch.zeros(8))
    with pytest.raises(TypeError, match=r"bool, not uint8"):
        unpack_mask(torch.zeros(1, dtype=torch.bool), 8)
    with pytest.raises(ValueError, match="2 bytes hold a mask of 9 features, not 1"):
        unpack_mask(torch.zeros(1, dtype=torch.uint8), 9)
