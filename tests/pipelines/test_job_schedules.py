"""Times of schedules, dates in parameters, and what a file of jobs may say."""

from datetime import UTC, date, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqrm.pipelines.jobs.config import Gate, Job, load_jobs
from dqrm.pipelines.jobs.durations import duration_text, parse_duration
from dqrm.pipelines.jobs.schedule import Schedule
from dqrm.pipelines.jobs.server import decide
from dqrm.pipelines.jobs.state import JobState, iso
from dqrm.pipelines.jobs.templates import render


def utc(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        # Clocks go back: 02:30 comes twice and counts once; forward: 02:30 is 03:30.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", "25T00:30 26T01:30 27T01:30"),
        ("30 2 * * *", "Europe/Berlin", "2027-03-27T12:00", "28T01:30 29T00:30 30T00:30"),
        # Forward at midnight: that day has no 00:30, and its run is not left out.
        ("30 0 * * *", "America/Sao_Paulo", "2018-11-03T12:00", "04T03:30 05T02:30"),
        # Started between a time that does not exist and what it stands for.
        ("30 2 * * *", "Europe/Berlin", "2027-03-28T01:10", "28T01:30 29T00:30"),
        # Every hour is every hour, however often it comes.
        ("0 * * * *", "Europe/Berlin", "2026-10-24T23:30", "25T00:00 25T01:00 25T02:00"),
        ("0 * * * *", "Europe/Berlin", "2027-03-28T00:30", "28T01:00 28T02:00"),
        # 0 and 7 are Sunday, as in cron.
        ("0 3 * * 0", "UTC", "2026-11-20T00:00", "22T03:00 29T03:00"),
        ("0 3 * * 5-7", "UTC", "2026-11-20T00:00", "20T03:00 21T03:00 22T03:00 27T03:00"),
        ("0 3 * * mon-fri", "UTC", "2026-11-20T00:00", "20T03:00 23T03:00"),
        ("@daily", "UTC", "2026-11-20T00:00", "21T00:00 22T00:00"),
    ],
)
def test_times_of_a_cron_expression(cron, zone, start, expected):
    expected = expected.split()
    times = islice(Schedule(cron=cron, timezone=zone).after(utc(start)), len(expected))
    assert [time.strftime("%dT%H:%M") for time in times] == expected


@settings(max_examples=20, deadline=None)
@given(
    minute=st.integers(0, 59),
    hour=st.integers(0, 23),
    zone=st.sampled_from(["Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe", "UTC"]),
    start=st.datetimes(datetime(2017, 1, 1), datetime(2027, 1, 1)),
)
def test_a_daily_schedule_has_each_day_once(minute, hour, zone, start):
    schedule = Schedule(cron=f"{minute} {hour} * * *", timezone=zone)
    times = list(islice(schedule.after(start.replace(tzinfo=UTC)), 8))
    days = [time.astimezone(schedule.zone).date() for time in times]
    assert all(later - day == timedelta(days=1) for day, later in pairwise(days))
    assert times == schedule.between(start.replace(tzinfo=UTC), times[-1])


def test_an_interval_is_counted_from_1970():
    schedule = Schedule(every="6h")
    assert schedule.between(utc("2026-11-20T05:59"), utc("2026-11-20T12:00")) == [
        utc("2026-11-20T06:00"),
        utc("2026-11-20T12:00"),
    ]
    assert schedule.between(utc("2026-11-20T06:00"), utc("2026-11-20T11:59")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/{{ date }}", "data/2026-03-01"),
        ("{{run_date}}{{ yesterday }}", "2026-03-012026-02-28"),
        ("{{ tomorrow | %Y/%m/%d }}", "2026/03/02"),
        ("{{ date - 1 day }}:{{ date-2 weeks|%j }}", "2026-02-28:046"),
        ("plain {x} 100%", "plain {x} 100%"),
    ],
)
def test_dates_in_parameters(text, expected):
    assert render(text, date(2026, 3, 1)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ yesterdy }}", "did you mean yesterday?"),
        ("{{ date - 1 }}", "is not understood"),
        ("{{ date.year }}", "is not understood"),
        ("{{ date | %H }}", "a format is made of %Y"),
        ("{{ date | Y }}", "a format is made of %Y"),
        ("{{ date", "not closed"),
        ("date }}", "not closed"),
        ("{{ date - 99999999 days }}", "no such date"),
        ("{{ date - 99999999999999999999 days }}", "no such date"),
    ],
)
def test_what_is_no_date_is_refused(text, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        render(text, date(2026, 3, 1))


@given(st.integers(1, 10**7))
def test_lengths_of_time_read_back(seconds):
    length = timedelta(seconds=seconds)
    assert parse_duration(duration_text(length)) == length


GOOD = 'jobs:\n  nightly:\n    schedule: {cron: "30 2 * * *"}\n    command: echo hello\n'


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("command", "comand", ["jobs.yaml:4: jobs.nightly.comand", "did you mean"]),
        ("30 2", "61 2", ["jobs.yaml:3: jobs.nightly.schedule.cron", "from 0 to 59"]),
        ("30 2 *", "30 2 30 2 *", ["must have five fields"]),
        ("* * *", "30 2 *", ["jobs.yaml:3: jobs.nightly.schedule", "that day never comes"]),
        ("* * *", "1 * 1", ["both a day of the month and a day of the week"]),
        ("30 2", "a 2", ["minute: a is not understood"]),
        ("30 2", "5-1 2", ["ends before it begins"]),
        ("30 2", "*/0 2", ["a step is from 1 to 59"]),
        ('cron: "30 2 * * *"', "every: 5", ["must be a length of time such as 30s"]),
        ('cron: "30 2 * * *"', "every: 0s", ["longer than nothing"]),
        ('cron: "30 2 * * *"', "timezone: UTC", ["give one of cron and every"]),
        ('* *"', '* *", timezone: Mars', ["is no time zone"]),
        ("nightly", "Every Night", ["cannot be the name of a job"]),
        ("echo hello", "echo {{ yesterdy }}", ["did you mean yesterday?"]),
        ("echo hello", "echo 'x", ["No closing quotation"]),
        ("echo hello", "''", ["command: is empty"]),
        ("command: echo", "overrides: [x]\n    command: echo", ["overrides are of a pipeline"]),
        ("command: echo", "pipeline: x\n    command: echo", ["give one of pipeline and command"]),
        ("command: echo", "gate: {metric: a}\n    command: echo", ["give at_least or at_most"]),
        ("command: echo", "missed: all\n    command: echo", ["it needs overlap=queue"]),
        ("command: echo", "on_failure: {webhook: x}\n    command: echo", ["begin with http"]),
        ("command: echo", "retries: {times: -1}\n    command: echo", ["retries.times=-1"]),
        ("jobs:", "folder: x\njob:", ["did you mean jobs?", "jobs: is required"]),
    ],
)
def test_faults_name_file_line_and_field(tmp_path, monkeypatch, old, new, messages):
    monkeypatch.chdir(tmp_path)
    Path("jobs.yaml").write_text(GOOD)
    load_jobs(Path("jobs.yaml"))
    assert old in GOOD
    Path("jobs.yaml").write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"jobs\.yaml") as caught:
        load_jobs(Path("jobs.yaml"))
    for message in messages:
        assert message in str(caught.value)


def test_a_gate_lets_no_nan_through():
    assert not Gate(metric="x", at_least=0.0).met(float("nan"))
    assert not Gate(metric="x", at_most=1.0).met(float("nan"))
    assert Gate(metric="x", at_least=0.0, at_most=1.0).met(1.0)
    assert not Gate(metric="x", at_least=0.0, at_most=1.0).met(1.1)


def hourly(**settings):
    return Job.model_validate(
        {"schedule": {"cron": "0 * * * *"}, "command": "x", "grace": "10m", **settings}
    )


def decided(job, state, now, busy=False):
    """Pending hours, and the others by what became of them."""
    decide(job, state, utc(f"2026-11-20T{now}"), busy)
    return [t[11:13] for t in state.pending], {e.scheduled[11:13]: e.outcome for e in state.events}


def fresh(seen="00:30"):
    state = JobState()
    decide(hourly(), state, utc(f"2026-11-20T{seen}"), False)
    assert state.pending == []
    return state


@pytest.mark.parametrize(
    ("settings", "now", "busy", "pending", "others"),
    [
        ({}, "01:00", False, ["01"], {}),
        ({}, "00:59", False, [], {}),
        ({}, "04:05", False, ["04"], dict.fromkeys(["01", "02", "03"], "missed")),
        ({}, "04:30", False, ["04"], dict.fromkeys(["01", "02", "03"], "missed")),
        ({"missed": "skip"}, "02:30", False, [], dict.fromkeys(["01", "02"], "missed")),
        ({"missed": "skip"}, "02:05", False, ["02"], {"01": "missed"}),
        ({"missed": "all", "overlap": "queue"}, "03:30", False, ["01", "02", "03"], {}),
        ({"missed": "all", "overlap": "queue"}, "03:30", True, ["01", "02", "03"], {}),
        ({}, "01:00", True, [], {"01": "skipped"}),
        ({"overlap": "queue"}, "01:00", True, ["01"], {}),
        ({"overlap": "queue", "grace": "3h"}, "03:00", False, ["01", "02", "03"], {}),
        ({"grace": "3h"}, "03:00", False, ["03"], dict.fromkeys(["01", "02"], "skipped")),
    ],
)
def test_what_becomes_of_times_that_have_come(settings, now, busy, pending, others):
    state = fresh()
    assert decided(hourly(**settings), state, now, busy) == (pending, others)
    # Asked again, nothing more has come.
    assert decided(hourly(**settings), state, now, busy) == (pending, others)


def test_a_waiting_run_counts_as_busy():
    state = fresh()
    decided(hourly(), state, "01:00")
    assert decided(hourly(), state, "02:00") == (["01"], {"02": "skipped"})


def test_another_schedule_and_a_pause_have_nothing_to_catch_up_on():
    state = fresh()
    other = hourly(schedule={"cron": "*/5 * * * *"})
    assert decided(other, state, "05:01") == ([], {})
    assert decided(other, state, "05:05") == (["05"], {})
    state = fresh()
    state.paused = True
    assert decided(hourly(), state, "05:00") == ([], {})
    state.paused, state.seen = False, iso(utc("2026-11-20T05:00"))
    assert decided(hourly(), state, "06:00") == (["06"], {})


def test_a_server_that_was_away_for_years_looks_back_a_month():
    state = fresh()
    decide(hourly(), state, utc("2029-01-01T00:30"), False)
    assert state.pending == ["2029-01-01T00:00:00+00:00"]
    assert len(state.events) == 31 * 24 - 1
