"""Text nobody should write: native and plain parser agree on every bit of what they make of it."""

import ctypes
import mmap
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqrm.kernels.delimited import Field, ParsedRows, Plan, Role
from dqrm.kernels.plan import MAX_LINE_BYTES

Check = Callable[..., ParsedRows]

# Pieces that meet every branch of the grammar when put side by side.
NUMBERS = [
    b"0", b"1", b"7", b"-1", b"-0", b"+5", b"007", b"12345678", b"123456789", b"99999999",
    b"65535", b"65536", b"4294967296", b"-2147483649", b"1" * 25, b"9" * 308, b"9" * 310,
    b"0.5", b".5", b"5.", b"-.5e3", b"1e5", b"1E+05", b"1e-7", b"3.4028235e38", b"3.4028236e38",
    b"1e39", b"-1e39", b"1e308", b"1e309", b"-1e999", b"1e-999", b"4.9e-324", b"2.4e-324",
    b"0e999999999999999999999", b"0." + b"0" * 400 + b"1", b"1" + b"0" * 400 + b"e-400",
    b"0.1234567890123456789", b"123456789012345678901234567890e-10", b"9007199254740993",
    b"1.00000005960464477539062500000001", b" 3", b"3 ", b" \t ", b" ",
]  # fmt: skip
NOT_NUMBERS = [
    b"abc", b"1e", b"1e+", b"e5", b".", b"-", b"+", b"--1", b"1-", b"1_0", b"0x10", b"1,5", b"1 2",
    b"inf", b"-Infinity", b"NaN", b"-nan", b"nano", b"infin", b"\xff", b"\0", b"1\0", b"\xd9\xa1",
    b"1.2.3", b"/", b":", b"1:", b"/1", b"12345/78", b"1234567:",
]  # fmt: skip
TIMES = [
    b"2020-02-29 12:34:56", b"2021-02-29", b"1900-02-29", b"2000-02-29T23:59:59.999999999Z",
    b"1969-12-31T23:59:59", b"0001-01-01", b"0000-01-01", b"9999-12-31T23:59:59+00:00",
    b"2020-01-01T00:00:00-23:59", b"2020-01-01T00:00:00+24:00", b"2020-01-01T24:00:00",
    b"2020-01-01T00:60:00", b"2020-01-01T00:00:60", b"2020-13-01", b"2020-04-31", b"2020-00-10",
    b"2020-01-01T00:00", b"2020-01-01 00:00:00.", b"2020-01-01 00:00:00.5z", b"2020-1-01",
    b"2020-01-01T00:00:00.123456789012345678901234567890Z", b"20200101", b"1574553600.25",
]  # fmt: skip
TEXTS = [
    b"", b"a", b"68fd1e64", b"68fd1e65", b"1234567", b"123456789", b"sixteen bytes ok", b"x" * 31,
    b"y" * 32, b"z" * 100, "\u00fc\u4e2d".encode(), b"a|b", b"|", b"||a||", b"a|a|c|", b'"', b'""',
    b'"q"', b'"a""b"', b'"a,b\tc"', b'a"b', b'"open', b'"a"b', b'"""', b'""""', b'"a|b"', b"\r",
    b"\r\r", b"a\rb", b"\xef\xbb\xbf", b"\0\0\0\0\0\0\0\0",
]  # fmt: skip
PIECES = st.one_of(
    st.sampled_from(NUMBERS + NOT_NUMBERS + TIMES + TEXTS + [b"0", b"1", b""] * 5),
    st.binary(max_size=20).map(lambda text: text.replace(b"\n", b"")),
    st.integers(-(10**12), 10**12).map(lambda number: b"%d" % number),
    st.floats().map(lambda number: repr(number).encode()),
)
FIELDS = st.one_of(
    st.sampled_from([Field(Role.SKIP), Field(Role.DENSE), Field(Role.DENSE, log1p=True)]),
    st.builds(
        Field,
        st.sampled_from([Role.CATEGORICAL, Role.MULTI_HOT]),
        buckets=st.sampled_from([0, 0, 1, 7, 2**31 - 1]),
    ),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    fields = draw(st.lists(FIELDS, min_size=1, max_size=6))
    for role in (Role.LABEL, Role.TIME):
        if draw(st.booleans()):
            fields.insert(draw(st.integers(0, len(fields))), Field(role))
    return Plan(
        tuple(fields),
        delimiter=draw(st.sampled_from("\t,; ")),
        quote=draw(st.sampled_from([None, '"', "'"])),
    )


@st.composite
def texts(draw: st.DrawFn, plan: Plan) -> bytes:
    """Lines that mostly have the plan's number of fields, each mostly of its kind."""
    delimiter = plan.delimiter.encode()
    fitting = {
        Role.LABEL: st.sampled_from([b"0", b"1", b"0.0", b"1.0", b" 1"]),
        Role.DENSE: st.sampled_from([*NUMBERS, b"", b"nan"]),
        Role.TIME: st.sampled_from(TIMES + NUMBERS),
    }
    lines = []
    for _ in range(draw(st.integers(0, 12))):
        line = []
        for field in plan.fields:
            fits = draw(st.integers(0, 19)) > 0
            piece = draw(fitting.get(field.role, PIECES) if fits else PIECES)
            if plan.quote is not None and draw(st.integers(0, 3)) == 0:
                quote = plan.quote.encode()
                piece = quote + piece.replace(quote, 2 * quote) + quote
            line.append(piece)
        if draw(st.integers(0, 9)) == 0:
            line = line[1:] if draw(st.booleans()) else [*line, b"more"]
        lines.append(delimiter.join(line))
    ends = st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n"])
    text = b"".join(line + draw(ends) for line in lines)
    return text if draw(st.booleans()) else text.rstrip(b"\r\n")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_plan_on_any_text(parse_checked: Check, data: st.DataObject) -> None:
    plan = data.draw(plans())
    parse_checked(data.draw(texts(plan)), plan, max_malformed=data.draw(st.sampled_from([5, 0])))


@pytest.mark.parametrize("role", [Role.LABEL, Role.DENSE, Role.TIME, Role.MULTI_HOT])
@pytest.mark.parametrize("quote", [None, '"'], ids=["plain", "quoted"])
def test_every_piece_alone(parse_checked: Check, role: Role, quote: str | None) -> None:
    pieces = NUMBERS + NOT_NUMBERS + TIMES + TEXTS
    text = b"\n".join(b"\t".join([piece, piece]) for piece in pieces)
    log1p = role is Role.DENSE
    second = Field(role, log1p=log1p) if role in (Role.DENSE, Role.MULTI_HOT) else Field(Role.SKIP)
    parsed = parse_checked(text, Plan((Field(role), second), quote=quote))
    assert parsed.rows > 0
    assert parsed.rows + parsed.malformed_count == len(pieces)


def criteo_like_line(rng: random.Random) -> bytes:
    dense = [b"" if rng.random() < 0.2 else b"%d" % rng.randint(-2, 10**5) for _ in range(13)]
    ids = [b"" if rng.random() < 0.2 else b"%08x" % rng.randint(0, 2**12) for _ in range(26)]
    return b"\t".join([b"%d" % rng.randint(0, 1), *dense, *ids])


CRITEO = Plan(
    (
        Field(Role.LABEL),
        *(Field(Role.DENSE, log1p=True), Field(Role.DENSE)) * 6,
        Field(Role.DENSE),
        *(Field(Role.CATEGORICAL), Field(Role.CATEGORICAL, buckets=1000)) * 13,
    )
)


@pytest.mark.parametrize("quote", [None, '"'], ids=["plain", "quoted"])
def test_mutated_criteo(parse_checked: Check, quote: str | None) -> None:
    """Several blocks of lines, of which many have bytes changed, lost, doubled or swapped in."""
    rng = random.Random(20)
    lines = []
    for _ in range(1500):
        line = bytearray(criteo_like_line(rng))
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 20])):
            at = rng.randrange(len(line))
            change = rng.randrange(4)
            if change == 0:
                line[at] = rng.choice(b'\t\t\r"-.0 aexN\0\xff')
            elif change == 1:
                del line[at]
            elif change == 2:
                line[at:at] = line[at : at + rng.randrange(30)]
            else:
                line[at:at] = rng.choice([b"\n", b"\r\n", b'""', b"\t\t", b"1e3", b"inf"])
        lines.append(bytes(line))
    parsed = parse_checked(
        b"\n".join(lines), Plan(CRITEO.fields, quote=quote), max_malformed=10_000
    )
    assert 500 < parsed.rows < 1500
    assert len(parsed.malformed) == parsed.malformed_count > 300
    assert [m.line for m in parsed.malformed] == sorted(m.line for m in parsed.malformed)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\t", b"\r"], ids=repr)
@pytest.mark.parametrize("quote", [None, '"'], ids=["plain", "quoted"])
def test_nothing_is_read_past_a_mapped_page(
    parse_checked: Check, quote: str | None, end: bytes
) -> None:
    """Text that ends with its page, as in a mapped file; reading the page after it kills."""
    libc = ctypes.CDLL(None, use_errno=True)
    no_access, read_write = 0, mmap.PROT_READ | mmap.PROT_WRITE
    rng = random.Random(3)
    # The last field is empty, so that its first 8 bytes are all past the text.
    text = b"\n".join(criteo_like_line(rng) for _ in range(20)).rpartition(b"\t")[0] + b"\t" + end
    size = 2 * mmap.PAGESIZE
    with mmap.mmap(-1, size + mmap.PAGESIZE) as mapped:
        mapped[size - len(text) : size] = text
        first = ctypes.c_char.from_buffer(mapped)
        guard = ctypes.c_void_p(ctypes.addressof(first) + size)
        del first
        assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
        # Whatever the text's length is modulo the 64 bytes of a step.
        for blank_lines in range(0, 64, 5):
            begin = size - len(text) - blank_lines
            mapped[begin : begin + blank_lines] = b"\n" * blank_lines
            with memoryview(mapped) as whole, whole[begin:size] as readable:
                assert parse_checked(readable, Plan(CRITEO.fields, quote=quote)).rows >= 19
        assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), read_write) == 0


@pytest.mark.parametrize("size", range(130))
def test_every_short_buffer(parse_checked: Check, size: int) -> None:
    text = b"0\tab\t1\n" * 20
    parse_checked(
        text[:size], Plan((Field(Role.LABEL), Field(Role.CATEGORICAL), Field(Role.DENSE)))
    )


@pytest.mark.parametrize("quote", [None, '"'], ids=["plain", "quoted"])
def test_sizes_beyond_every_internal_one(parse_checked: Check, quote: str | None) -> None:
    plan = Plan((Field(Role.CATEGORICAL), Field(Role.MULTI_HOT), Field(Role.DENSE)), quote=quote)
    longest = MAX_LINE_BYTES - len("\ta|b\t1")
    rows = [
        b"x" * 70_000 + b"\t" + b"|".join(b"%d" % i for i in range(30_000)) + b"\t1",
        b"y" * longest + b"\ta|b\t1",
        b"y" * (longest + 1) + b"\ta|b\t1",
        b"\t" * 200_000,
        b'"' + b"\t" * 200_000 + b'"\t\t2',
        b"short\ta\t" + b"0" * 100_000 + b"3",
        b"short\ta\t0." + b"0" * 100_000 + b"3e100001",
    ]
    parsed = parse_checked(b"\r\n".join(rows), plan)
    assert parsed.rows == 4 + (quote is not None)
    assert parsed.malformed[0].reason == (
        f"line has {MAX_LINE_BYTES + 1} bytes, more than {MAX_LINE_BYTES}"
    )


def test_many_short_lines_outgrow_the_estimate(parse_checked: Check) -> None:
    """Where samples of the text see long lines only, the columns have to grow."""
    plan = Plan((Field(Role.CATEGORICAL), Field(Role.DENSE)))
    long, short = (b"long" * 4000 + b"\t1\n"), b"s\t2\n"
    text = b"".join(long + short * 700 for _ in range(16))
    parsed = parse_checked(text + short * 5000, plan)
    assert parsed.rows == 16 * 701 + 5000
