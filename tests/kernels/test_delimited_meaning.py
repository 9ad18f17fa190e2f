"""What lines mean, by hand: values, ids, missing, and the words for what is wrong."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import xxhash

from dqrm.kernels.delimited import Field, ParsedRows, Plan, Role

Check = Callable[..., ParsedRows]
FIELDS = (Field(Role.LABEL), Field(Role.DENSE, log1p=True), Field(Role.CATEGORICAL))


def key(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode())


def test_a_small_file(parse_checked: Check) -> None:
    plan = Plan(
        (
            Field(Role.TIME),
            Field(Role.LABEL),
            Field(Role.SKIP),
            Field(Role.DENSE),
            Field(Role.MULTI_HOT),
            Field(Role.DENSE, log1p=True),
            Field(Role.CATEGORICAL),
            Field(Role.CATEGORICAL, buckets=10),
        ),
        delimiter=",",
        quote='"',
    )
    text = (
        b"2019-11-24 00:00:00.5Z,1,?,-2.5,a|b,3,red,x\r\n"
        b"\r\n"
        b'12,0,"?,?",,,-3,"r""d, ed",x\n'
        b"1e3,0.0,,nan,b|b|,,red,y"
    )
    parsed = parse_checked(text, plan)
    assert (parsed.rows, parsed.lines, parsed.malformed) == (3, 4, [])
    assert parsed.time is not None
    assert parsed.time.tolist() == [1574553600.5, 12.0, 1000.0]
    assert parsed.label.tolist() == [1.0, 0.0, 0.0]
    np.testing.assert_array_equal(
        parsed.dense, np.array([[-2.5, 0, 0], [math.log1p(3), 0, 0]], np.float32)
    )
    assert parsed.ids[0].tolist() == [0, 1, 0]
    assert parsed.ids[1].tolist() == [(key(text) * 10) >> 64 for text in "xxy"]
    offsets, ids = parsed.lists[0]
    assert offsets.tolist() == [0, 2, 2, 4]
    assert ids.tolist() == [0, 1, 1, 1]
    red, hashed, listed = parsed.unique_keys
    assert red is not None
    assert listed is not None
    assert red.tolist() == [key("red"), key('r"d, ed')]
    assert hashed is None
    assert listed.tolist() == [key("a"), key("b")]
    assert parsed.missing.tolist() == [2, 1, 0, 0, 1]


def test_values_of_malformed_lines_leave_no_trace(parse_checked: Check) -> None:
    parsed = parse_checked(b"1\t2\tgood\n1\tbad\tunseen\n0\t\tgood\n2\t\tunseen\n", Plan(FIELDS))
    assert parsed.rows == 2
    assert parsed.missing.tolist() == [1, 0]
    (keys,) = parsed.unique_keys
    assert keys is not None
    assert keys.tolist() == [key("good")]


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (b"1\t2", None, "expected 3 fields, found 2"),
        (b"1\t2\ta\t", None, "expected 3 fields, found 4"),
        (b"7\t2\ta", 0, "label '7' is not 0 or 1"),
        (b"\t2\ta", 0, "label '' is not 0 or 1"),
        (b"1\tabc\ta", 1, "dense value 'abc' is not a number"),
        (b"1\tinf\ta", 1, "dense value 'inf' is not finite"),
        (b"1\t1e999\ta", 1, "dense value '1e999' is too large"),
        (b"1\t\x1b[2J\xff\ta", 1, r"dense value '\x1b[2J\\xff' is not a number"),
        (b"x\t" + b"9" * 50 + b"x\ta", 0, "label 'x' is not 0 or 1"),
        (b"1\t" + b"9" * 50 + b"x\ta", 1, f"dense value '{'9' * 40}...' is not a number"),
        (b'1\t2\t"a', 2, "unterminated quote (line breaks inside quotes are not supported)"),
        (b'1\t"2"3\ta', 1, "text after the closing quote"),
    ],
    ids=[
        "too-few", "too-many", "label", "no-label", "not-a-number", "infinite", "overflow",
        "terminal-escape", "first-fault-wins", "long-value", "open-quote", "after-quote",
    ],
)  # fmt: skip
def test_malformed_lines_are_named(
    parse_checked: Check, line: bytes, field: int | None, reason: str
) -> None:
    parsed = parse_checked(b"1\t1\tx\n" + line + b"\n0\t1\ty\n", Plan(FIELDS, quote='"'))
    assert (parsed.rows, parsed.malformed_count) == (2, 1)
    (malformed,) = parsed.malformed
    assert (malformed.line, malformed.field, malformed.reason) == (1, field, reason)


def test_every_small_integer_has_the_logarithm_of_the_c_library(parse_checked: Check) -> None:
    """The native table and its end, against math.log1p rounded once."""
    numbers = [*range(70_000), 10**6, 10**7 - 1, 99_999_999, 10**8, 2**32, 10**15, 10**30]
    text = b"".join(b"%d\n" % number for number in numbers)
    parsed = parse_checked(text, Plan((Field(Role.DENSE, log1p=True),)))
    expected = np.array([math.log1p(number) for number in numbers], np.float32)
    np.testing.assert_array_equal(parsed.dense[0], expected)


def test_a_plan_without_label_or_time_or_categories(parse_checked: Check) -> None:
    parsed = parse_checked(b"1\n2\n", Plan((Field(Role.DENSE),)))
    assert parsed.label.tolist() == [0.0, 0.0]
    assert parsed.time is None
    assert parsed.ids.shape == (0, 2)


def test_no_text(parse_checked: Check) -> None:
    parsed = parse_checked(b"", Plan((*FIELDS, Field(Role.MULTI_HOT), Field(Role.TIME))))
    assert (parsed.rows, parsed.lines) == (0, 0)
    assert parsed.lists[0][0].tolist() == [0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan(()), "at least one field"),
        (lambda: Plan(FIELDS, delimiter="||"), "delimiter='||': must be one ASCII character"),
        (lambda: Plan(FIELDS, delimiter="\n"), "no line break"),
        (lambda: Plan(FIELDS, delimiter="\u00a6"), "must be one ASCII character"),
        (lambda: Plan(FIELDS, delimiter=",", quote=","), "must differ from the delimiter"),
        (lambda: Plan((Field(Role.MULTI_HOT),), delimiter="|"), "list_separator='|': must differ"),
        (lambda: Plan(FIELDS * 2), "2 are LABEL, at most one can be"),
        (lambda: Field(Role.CATEGORICAL, buckets=-1), "buckets=-1: must be between 0 and"),
        (lambda: Field(Role.CATEGORICAL, buckets=2**31), "must be between 0 and 2147483647"),
        (lambda: Field(Role.DENSE, buckets=5), "a DENSE field is not hashed"),
        (lambda: Field(Role.LABEL, log1p=True), "a LABEL field has no transform"),
    ],
)
def test_contradictory_plans_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        make()
