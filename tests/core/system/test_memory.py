"""Activations come back bit for bit from wherever they were; amounts are read and shared out."""

import gc

import pytest
import torch

from prunekit import WrongInput
from prunekit.system.memory import GIB, Room, Shares
from prunekit.system.sizes import amount, parse_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_does_not_fit_comes_back_bit_for_bit_from_a_file(dtype, tmp_path):
    tensors = [torch.randn(3, 5).to(dtype) for _ in range(4)]
    size = tensors[0].nbytes
    room = Room(2 * size, tmp_path)
    row = room.row(tensors)
    assert (room.held, room.spilled, len(list(tmp_path.iterdir()))) == (2 * size, 2 * size, 2)
    assert all(torch.equal(a, b) for a, b in zip(row, tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(row[1:], tensors[1:], strict=True))
    row[3] = tensors[0]
    row[0] = tensors[1]  # takes the place in memory that it makes free
    assert torch.equal(row[3], tensors[0])
    assert torch.equal(row[0], tensors[1])
    assert (room.held, room.spilled, len(list(tmp_path.iterdir()))) == (2 * size, 2 * size, 2)
    del row
    gc.collect()
    assert (room.held, room.spilled, list(tmp_path.iterdir())) == (0, 0, [])


def test_what_is_left_of_a_room_takes_no_file_of_the_next_one_in_its_folder(tmp_path):
    left = Room(0, tmp_path).row([torch.zeros(3)])
    row = Room(0, tmp_path).row([torch.ones(3)])
    del left
    gc.collect()
    assert torch.equal(row[0], torch.ones(3))


def test_a_room_without_bound_writes_nothing(tmp_path):
    room = Room(folder=tmp_path)
    tensor = torch.randn(7)
    assert room.row([tensor])[0] is tensor
    assert not list(tmp_path.iterdir())


def test_a_room_without_folder_has_a_temporary_one():
    room = Room(0)
    row = room.row([torch.arange(3)])
    assert torch.equal(row.pop(), torch.arange(3))
    assert (room.held, room.spilled) == (0, 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", None), ("8GiB", 8 * GIB), ("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), (4096, 4096),
        (" 4096 ", 4096), ("1b", 1), ("2TIB", 2 << 40), ("0.5kB", 500),
    ],
)  # fmt: skip
def test_amounts_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["2k", "", "much", "0", "0.4", -5, "-3GB", "1,5GB", "1 000MB", "8GiB of it", "8gbit", "8ib", "1e9", "nan", "GB"],
)
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(WrongInput, match=f"^no amount of memory '{text}'; give auto, or as 8GiB, 500MB$"):
        parse_size(text)


def test_amounts_are_said():
    assert [amount(n) for n in (0, 1023, 1536, 3 * GIB, 4000 * GIB)] == [
        "0 B", "1,023 B", "1.50 KiB", "3.00 GiB", "4,000.00 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize("paged", [True, False])
def test_a_walk_and_a_search_each_stay_within_what_is_free(paged):
    free = 10 * GIB + 3
    shares = Shares.of(free, paged=paged)
    assert (shares.blocks is None) == (not paged)
    always = (shares.blocks or 0) + shares.teacher
    assert always + (shares.activations or 0) <= free
    assert always + shares.hidden + shares.dense + shares.parts <= free
    assert Shares.of(-1, paged=True) == Shares(0, 0, 0, 0, 0, 0)
