"""Headers: what is not the expected message is refused with words that say what it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqrm.comm.message import (
    HEADER_BYTES,
    Header,
    MessageError,
    check_message,
    name_checksum,
    read_header,
    write_header,
)

HEADER = Header(
    codec=8,
    rank=2,
    generation=65_537,
    step=2**32 + 9,
    name=name_checksum("top.0.weight"),
    count=77,
    size=100,
    largest=132,
)


def message() -> Tensor:
    made = torch.arange(HEADER_BYTES + HEADER.size + 10).to(torch.uint8)
    write_header(made, HEADER)
    return made


def check(data: Tensor, expected: Header = HEADER) -> Header:
    header = read_header(data, 2)
    check_message(data, header, expected)
    return header


def test_headers_come_back_and_padding_does_not_matter() -> None:
    data = message()
    data[-10:] = 0
    header = check(data)
    assert (header.codec, header.count, header.size, header.largest) == (8, 77, 100, 132)
    assert (header.generation, header.step) == (1, 9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generation": 65_538}, "generation 1 where 2 was expected"),
        ({"step": 10}, "step 9 where 10 was expected"),
        ({"name": 5}, "name .* where 5 was expected"),
        ({"codec": 9}, "codec 8 where 9 was expected"),
    ],
)
def test_foreign_messages_are_told_apart(change: dict[str, int], said: str) -> None:
    with pytest.raises(MessageError, match=said):
        check(message(), Header(**(vars(HEADER) | change)))


def test_other_ranks_and_other_releases_are_named() -> None:
    with pytest.raises(MessageError, match="rank 2 came in place of rank 1"):
        read_header(message(), 1)
    other = message()
    other[6] = 9
    with pytest.raises(MessageError, match="version 9; do all ranks run the same release"):
        read_header(other, 2)
    with pytest.raises(MessageError, match="shorter than a header"):
        read_header(message()[:20], 2)
    with pytest.raises(MessageError, match="132 bytes were announced, 131 came"):
        check(message()[:131])


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, HEADER_BYTES + HEADER.size - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(at: int, bit: int) -> None:
    data = message()
    data[at] ^= 1 << bit
    with pytest.raises(MessageError):
        check(data)


def test_messages_too_long_for_their_header_are_refused() -> None:
    with pytest.raises(MessageError, match="too many for one message"):
        write_header(message(), Header(8, 2, 0, 0, 0, 0, 2**32 - 20, 0))
