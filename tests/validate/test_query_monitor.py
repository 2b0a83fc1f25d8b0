"""The query monitor: what it flags, whom it leaves alone, and that no answer tells which query it was."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats

from aidefend import AidefendError, ConfigurationError
from aidefend.validate import Capacity, Energy, Guard, MemoryStore, QueryMonitor, RedisStore, SQLiteStore
from aidefend.validate.queries.calibrating import check_streams, replay_scores
from aidefend.validate.queries.rules import paced
from aidefend.validate.queries.trail import STATISTICS
from tests.validate.query_world import CLASSES, FEATURES, FakeRedis, day, days, model, probes
from tests.validate.small_world import model as guarded_model
from tests.validate.small_world import rows

KEY = b"0123456789abcdef"
STREAMS = days(80)


class Clock:
    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "rules.json"
    QueryMonitor.calibrate(STREAMS, MemoryStore(), alpha=0.05, key=KEY).save(path)
    return path


def monitor_of(saved, store=None, **options):
    clock = Clock()
    return QueryMonitor.load(saved, store or MemoryStore(), clock=clock, **options), clock


def ask(monitor, principal, x):
    return monitor.watch(principal, x, model(x))


def test_fresh_benign_accounts_are_flagged_as_rarely_as_promised(saved):
    monitor, _ = monitor_of(saved)
    flagged = sum(ask(monitor, f"benign-{i}", day(1000 + i)).flagged for i in range(100))
    n, rank = 54, 2  # 80 accounts, 26 of them for what is usual; rank = floor(.05 * 55)
    assert monitor.level == pytest.approx(rank / (n + 1))
    assert flagged <= stats.betabinom.ppf(0.9999, 100, rank, n + 1 - rank)  # fails by chance once in 10,000 keys


@pytest.mark.parametrize("size", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("at_once", [1, 50])
def test_a_run_of_near_duplicates_is_flagged(saved, size, at_once):
    monitor, _ = monitor_of(saved)
    standings = [ask(monitor, "eve", part) for part in probes(150, size=size).split(at_once)]
    assert (standings[-1].flagged and not standings[0].flagged) or at_once == 50
    assert sum(bool(standing.remark) for standing in standings) == 1  # remarked once, when it happened
    assert all(standing.allowed for standing in standings)


def test_retries_of_the_very_same_row_are_no_evidence_but_of_volume(saved):
    monitor, _ = monitor_of(saved)
    assert not ask(monitor, "a", day(1).repeat_interleave(3, dim=0)).flagged
    burst = ask(monitor, "b", torch.cat([day(1), probes(40)]))
    assert burst.score > 2 * monitor.standing("a").score


def test_answers_that_change_among_near_duplicates_count_more(saved):
    monitor, _ = monitor_of(saved)
    x = probes(25)
    steady = torch.zeros(25, CLASSES)
    steady[:, 0] = 5.0
    changing = steady.clone()
    changing[::2] = torch.tensor([0.0, 5.0, 0.0])
    calm, nervous = monitor.watch("calm", x, steady), monitor.watch("nervous", x + 40, changing)
    assert nervous.score > calm.score + 1


def test_the_answer_at_the_flag_is_the_usual_one_and_the_account_ends_later(saved):
    monitor, clock = monitor_of(saved, delay=(10.0, 120.0))
    standing = ask(monitor, "eve", probes(150))
    assert standing.flagged and standing.allowed and "flagged: " in standing.remark
    clock.now += 9.9
    assert ask(monitor, "eve", day(3)).allowed
    clock.now += 110.2
    later = ask(monitor, "eve", day(5))
    assert not later.allowed and later.flagged and not later.remark
    assert ask(monitor, "alice", day(7)).allowed
    monitor.release("eve")
    assert ask(monitor, "eve", day(9)).allowed and not monitor.standing("eve").flagged


class Counting(MemoryStore):
    """Counts what a call reads and writes: time is noise here, work is not."""

    def __init__(self):
        super().__init__()
        self.work = []

    def run(self, work, now, ttl):
        counts = {"get": 0, "put": 0}

        def counted(session):
            for name in counts:
                inner = getattr(session, name)

                def step(*given, name=name, inner=inner, **options):
                    counts[name] += 1
                    return inner(*given, **options)

                setattr(session, name, step)
            return work(session)

        found = super().run(counted, now, ttl)
        self.work.append((counts["get"], counts["put"]))
        return found


def test_a_call_is_the_same_work_whether_it_flags_or_comes_from_a_suspended_account(saved):
    """The crowd around the rows decides how much is read, not the standing of the account."""
    work, standings = {}, {}
    for action in ("suspend", "alert"):
        store = Counting()
        monitor, clock = monitor_of(saved, store, action=action)
        standings[action] = []
        for part in torch.cat([probes(150), day(3)]).split(2):
            standings[action].append(ask(monitor, "eve", part))
            clock.now += 30
        work[action] = store.work
    assert [one.allowed for one in standings["suspend"]] != [one.allowed for one in standings["alert"]]
    assert work["suspend"] == work["alert"] and not standings["suspend"][-1].allowed
    flag = next(i for i, one in enumerate(standings["alert"]) if one.remark)
    puts = {put for _, put in work["alert"][:75]}
    assert len(puts) == 1 and 0 < flag < 75  # among near rows, the call that flags writes what all others write


def test_the_moment_of_the_suspension_is_drawn_anew_for_each_account(saved):
    monitor, clock = monitor_of(saved, delay=(10.0, 120.0))
    for i in range(20):
        ask(monitor, f"eve-{i}", probes(150, seed=i))
    allowed = []
    for _ in range(12):
        clock.now += 10
        allowed.append(sum(monitor.standing(f"eve-{i}").allowed for i in range(20)))
    assert allowed[0] == 20 and allowed[-1] == 0 and len(set(allowed)) >= 5


def test_alert_never_suspends(saved):
    monitor, clock = monitor_of(saved, action="alert")
    assert ask(monitor, "eve", probes(150)).flagged
    clock.now += 1000
    assert ask(monitor, "eve", day(3)).allowed


def test_many_accounts_with_few_queries_each_are_seen_together(saved):
    monitor, _ = monitor_of(saved)
    x = probes(300)
    standings = [ask(monitor, f"sybil-{i}", part) for i, part in enumerate(x.split(4))]
    alone = [monitor_of(saved)[0].watch("sybil", part, model(part)).flagged for part in x.split(4)[:5]]
    assert not any(alone) and not standings[0].flagged
    assert all(standing.flagged for standing in standings[-10:]) and "shared" in standings[-1].remark


def test_nobody_can_have_another_account_suspended(saved):
    monitor, clock = monitor_of(saved)
    x = probes(400)
    for part in x[:399].split(1):
        ask(monitor, "framer", part)
    victim = ask(monitor, "victim", x[399:])
    assert victim.flagged and "by others" in victim.remark
    clock.now += 1000
    assert ask(monitor, "victim", day(3)).allowed and not ask(monitor, "framer", day(5)).allowed


def test_an_account_that_was_framed_first_is_suspended_for_what_it_does_itself(saved):
    """Planted violation: whoever has a second account flag the first one could then attack from it for good."""
    monitor, clock = monitor_of(saved)
    x = probes(400)
    for part in x[:399].split(1):
        ask(monitor, "second", part)
    framed = ask(monitor, "main", x[399:])
    assert framed.flagged and "by others" in framed.remark
    clock.now += 1000
    standings = [ask(monitor, "main", part) for part in probes(150, seed=5).split(10)]
    remarks = [standing.remark for standing in standings if standing.remark]
    assert len(remarks) == 1 and "by others" not in remarks[0] and all(standing.allowed for standing in standings)
    clock.now += 121
    assert not ask(monitor, "main", day(3)).allowed


def test_framed_accounts_do_not_crowd_out_the_suspended(saved):
    """One query near a crowd flags an account: a flood of such accounts must go before those that attacked."""
    monitor, clock = monitor_of(saved, MemoryStore(Capacity(principals=16, shared=4096)))
    x = probes(400)
    ask(monitor, "eve", probes(150, seed=5))
    for part in x[:300].split(1):
        ask(monitor, "framer", part)
    flood = [ask(monitor, f"flood-{i}", x[300 + i : 301 + i]) for i in range(100)]
    assert all(standing.flagged for standing in flood)
    clock.now += 121
    assert not monitor.standing("eve").allowed and not monitor.standing("framer").allowed


def test_flags_of_an_alert_count_once_the_action_is_to_suspend(saved):
    store = MemoryStore()
    watching, clock = monitor_of(saved, store, action="alert")
    ask(watching, "eve", probes(150))
    ask(watching, "cleared", probes(150, seed=5))
    watching.release("cleared")
    acting, other_clock = monitor_of(saved, store)
    other_clock.now = clock.now + 121
    assert not acting.standing("eve").allowed and acting.standing("cleared").allowed


def test_benign_queries_in_between_do_not_wash_the_evidence_away(saved):
    monitor, _ = monitor_of(saved)
    near, other = probes(60), day(2, n=1200)
    for i in range(60):  # the ring holds 64 queries: three of the attack if it kept the latest
        ask(monitor, "eve", torch.cat([near[i : i + 1], other[20 * i : 20 * i + 20]]))
    ask(monitor, "alice", other)
    kept = {
        who: monitor._store.run(lambda session, who=who: monitor._trail(session, monitor._name(who)), 0.0, 1.0)
        for who in ("eve", "alice")
    }
    assert kept["eve"].peaks[0] >= 20 > 2 * kept["alice"].peaks[0]  # near ones at the finest radius


def test_evidence_fades_with_its_life(saved):
    monitor, clock = monitor_of(saved)
    fresh = ask(monitor, "eve", probes(10)).score
    clock.now += 3 * 86_400
    assert monitor.standing("eve").score < 0.3 * fresh
    clock.now -= 10 * 86_400  # a clock that goes back gives nothing back
    assert monitor.standing("eve").score == pytest.approx(fresh, rel=1e-6)


def test_a_suspension_outlasts_any_wait_and_other_state_does_not(saved, tmp_path):
    for store in (MemoryStore(), SQLiteStore(tmp_path / "q")):
        monitor, clock = monitor_of(saved, store)
        ask(monitor, "eve", probes(150))
        ask(monitor, "alice", day(3))
        clock.now += 30 * 86_400
        assert not ask(monitor, "eve", day(5)).allowed and ask(monitor, "bob", day(7)).allowed
        assert monitor.health().principals == 2 and monitor.health().evicted == 0


def test_a_large_call_lets_others_have_their_turn_and_counts_the_same(saved):
    """Planted violation: as one transaction, a call of thousands of rows kept all accounts waiting for its end."""
    one, many = monitor_of(saved)[0], monitor_of(saved)[0]
    x = torch.cat([day(2, n=200), probes(150)])
    whole, turns = one.watch("a", x, model(x)), []
    run = many._store.run

    def counted(work, now, ttl):
        turns.append(len(turns))
        if len(turns) == 3:
            assert many.standing("b").score == 0.0
        return run(work, now, ttl)

    many._store.run = counted
    assert many.watch("a", x, model(x)) == whole and len(turns) == 7  # six parts, and the other account
    single = monitor_of(saved)[0]
    alone = [ask(single, "a", row) for row in x.split(1)]
    assert alone[-1].score == pytest.approx(whole.score, rel=1e-6)
    assert whole.remark == "; ".join(standing.remark for standing in alone if standing.remark) != ""


def test_what_one_worker_saw_the_others_know(saved, tmp_path):
    server = FakeRedis()
    for make in (lambda: SQLiteStore(tmp_path / "q"), lambda: RedisStore(server)):
        first, second = (monitor_of(saved, make())[0] for _ in range(2))
        alone = monitor_of(saved)[0]
        x = probes(60)
        for i, part in enumerate(x.split(1)):
            score = ask((first, second)[i % 2], "eve", part).score
            alone_score = ask(alone, "eve", part).score
        assert score == pytest.approx(alone_score, rel=1e-6)


def test_a_flood_of_accounts_leaves_memory_bounded_and_a_suspect_known(saved):
    monitor, _ = monitor_of(saved, MemoryStore(Capacity(principals=32, shared=1024)))
    assert ask(monitor, "eve", probes(150)).flagged
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(1))
    for i in range(300):
        ask(monitor, f"flood-{i}", x[i : i + 1])
    health = monitor.health()
    assert health.principals == 32 and health.shared <= 1024 and health.evicted > 0
    assert monitor.standing("eve").flagged


@pytest.mark.parametrize("shape", [(12,), (40,), (3, 8, 8), (2, 50), (1, 40, 64)])
def test_any_rank_and_size(shape):
    monitor = QueryMonitor.calibrate(days(45, shape=shape), MemoryStore(), alpha=0.05, key=KEY)
    x = probes(100, shape=shape)
    assert ask(monitor, "eve", x).flagged and not ask(monitor, "alice", day(201, shape=shape)).flagged


def test_save_and_load_change_nothing_and_hide_the_key(saved):
    assert saved.stat().st_mode & 0o777 == 0o600
    first, second = monitor_of(saved)[0], monitor_of(saved)[0]
    direct = QueryMonitor.calibrate(STREAMS, MemoryStore(), alpha=0.05, key=KEY, clock=Clock())
    x = torch.cat([day(3), probes(20)])
    assert ask(first, "a", x) == ask(second, "a", x) == ask(direct, "a", x)


def test_another_key_sees_other_fingerprints_and_the_same_attack(saved):
    other = QueryMonitor.calibrate(STREAMS, MemoryStore(), alpha=0.05)
    mine = monitor_of(saved)[0]
    x = day(5)
    read = [(one._rules.sketcher, one._rules.read(x, model(x))) for one in (mine, other)]
    marks = [{mark for row in sketcher.marks(seen.sketches) for mark in row} for sketcher, seen in read]
    assert not marks[0] & marks[1] and not set(read[0][1].contents) & set(read[1][1].contents)
    assert ask(other, "eve", probes(150)).flagged


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace("aidefend.queries/3", "aidefend.queries/2"),
        lambda text: text.replace('"ring":64', '"ring":"64"'),
        lambda text: text.replace('"unit"', '"unite"'),
        lambda text: text.replace('"alpha":0.05', '"alpha":5'),
        lambda text: text.replace('"shape":[12]', '"shape":[13]'),
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_a_damaged_calibration_is_refused(saved, tmp_path, damage):
    (tmp_path / "rules").write_text(damage(saved.read_text()))
    with pytest.raises(ConfigurationError):
        QueryMonitor.load(tmp_path / "rules", MemoryStore())


def test_the_store_of_another_calibration_is_refused(saved):
    store = MemoryStore()
    monitor, _ = monitor_of(saved, store)
    ask(monitor, "a", day(1))
    four = [(x, torch.cat([y, y[:, :1]], dim=1)) for x, y in STREAMS]
    other = QueryMonitor.calibrate(four, store, alpha=0.05, key=KEY, clock=Clock())
    with pytest.raises(AidefendError, match="state of this calibration"):
        other.standing("a")


def test_no_name_and_no_input_reaches_the_store(saved, tmp_path):
    monitor, _ = monitor_of(saved, SQLiteStore(tmp_path / "q"))
    x = day(1)
    ask(monitor, "a-very-special-name", x)
    monitor.close()
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"special" not in held and x[0].numpy().tobytes() not in held


def test_rows_that_are_not_finite_and_empty_calls_do_no_harm(saved):
    monitor, _ = monitor_of(saved)
    x = day(1)
    x[3], x[4] = float("nan"), float("inf")
    outputs = model(x)
    assert monitor.watch("a", x, outputs).score >= 0 and ask(monitor, "a", x[:0]).score >= 0
    json.dumps(monitor.standing("a").score, allow_nan=False)


@pytest.mark.parametrize("principal", ["", None, 7, b"a", "x" * 257])
def test_a_principal_is_a_name(saved, principal):
    with pytest.raises(ConfigurationError, match="principal"):
        ask(monitor_of(saved)[0], principal, day(1))


def test_other_shapes_and_classes_are_refused(saved):
    monitor, _ = monitor_of(saved)
    for x, outputs in ((day(1)[:, :5], model(day(1))), (day(1), torch.zeros(20, 4)), (day(1), torch.zeros(19, 3))):
        with pytest.raises(ConfigurationError):
            monitor.watch("a", x, outputs)


def test_too_few_accounts_say_how_many_are_needed():
    with pytest.raises(ConfigurationError, match="at least 119 benign principals"):
        QueryMonitor.calibrate(STREAMS, MemoryStore(), alpha=0.01)


@pytest.mark.parametrize(("promise", "n", "rank"), [("marginal", 54, 2), ("calibration-conditional", 59, 1)])
def test_so_many_calibrated_accounts_lie_above_the_threshold_as_the_promise_allows(promise, n, rank):
    """Given the calibration, the rate is Beta(rank, n + 1 - rank): the second promise alone keeps to .05 with 95 %."""
    options = {"alpha": 0.05, "promise": promise, "key": KEY}
    monitor = QueryMonitor.calibrate(STREAMS, MemoryStore(), **options)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(80)
    scores = replay_scores(monitor._rules, check_streams([STREAMS[i] for i in order[80 - n :]]))
    assert (scores > monitor.threshold).sum() == rank - 1 and (scores == monitor.threshold).any()
    assert monitor.level == pytest.approx(rank / (n + 1))
    kept = stats.beta(rank, n + 1 - rank).cdf(0.05)
    assert kept >= 0.95 if promise == "calibration-conditional" else kept < 0.95


def busy_days(count):
    """Benign accounts of 20 to 400 queries, three in five of which come close to those before."""
    found = []
    for seed in range(count):
        stream = torch.Generator().manual_seed(500 + seed)
        x = torch.randn(int(20 * 20 ** float(torch.rand((), generator=stream))), 12, generator=stream)
        for start in range(0, len(x), 20):
            burst = x[start : start + 12]
            burst[:] = burst[0] + 0.05 * torch.randn(len(burst), 12, generator=stream)
        found.append((x, model(x)))
    return found


def test_busy_accounts_do_not_keep_a_quick_attack_unseen_and_queries_before_it_do_not_help():
    rules = QueryMonitor.calibrate(busy_days(80), MemoryStore(), alpha=0.05, key=KEY, ring=32)._rules
    order = np.random.Generator(np.random.Philox(key=0)).permutation(80)
    fresh = check_streams([busy_days(80)[i] for i in order[26:]])
    plain = dataclasses.replace(rules, weight=1e-9)
    plain = dataclasses.replace(plain, threshold=float(np.sort(replay_scores(plain, fresh))[-rules.rank]))

    def flag_at(used, x):
        monitor = QueryMonitor(used, MemoryStore(), clock=Clock())
        standings = (monitor.watch("eve", x[i : i + 1], model(x[i : i + 1])) for i in range(len(x)))
        return next(i for i, standing in enumerate(standings) if standing.remark)

    before = torch.cat([x for x, _ in busy_days(6)])[:300]
    for seed in range(3):
        quick = probes(60, seed, size=0.15)
        assert flag_at(rules, quick) < flag_at(plain, quick)
        assert flag_at(rules, torch.cat([before, quick])) <= flag_at(plain, torch.cat([before, quick])) + 4


def test_the_joint_score_is_the_larger_one_of_both_kinds_and_what_is_counted_is_held_against_the_volume(saved):
    rules = monitor_of(saved)[0]._rules
    statistics = np.arange(1.0, 15.0)
    place = STATISTICS.index("volume")
    statistics[place] = 192.0  # the root of 1 + 192 / 64 is 2
    kept = [STATISTICS.index(name) for name in ("drift", "odd", "thin", "classes", "volume")]
    halved = [i for i in range(14) if i not in kept]
    assert np.allclose(paced(statistics)[kept], statistics[kept])
    assert np.allclose(paced(statistics)[halved], statistics[halved] / 2)
    units = [
        np.maximum(values - usual[:, 0], 0.0) / usual[:, 1]
        for values, usual in zip((statistics, paced(statistics)), rules.usual, strict=True)
    ]
    roots = [float(np.sqrt((unit**2).sum())) for unit in units]
    for weight in (1e-3, 1e3):
        found = float(dataclasses.replace(rules, weight=weight).scores(statistics))
        assert found == pytest.approx(max(roots[0], weight * roots[1]))
    both = rules.scores(np.stack([statistics, 2 * statistics]))
    assert both.shape == (2,) and both[0] == pytest.approx(float(rules.scores(statistics)))


def test_a_promise_for_this_very_calibration_needs_more_accounts():
    few = {"alpha": 0.05, "promise": "calibration-conditional"}
    with pytest.raises(ConfigurationError, match=r"at least 79 benign principals.*59 for the threshold"):
        QueryMonitor.calibrate(STREAMS[:78], MemoryStore(), **few)
    for wrong in ({"promise": "class-conditional"}, {"promise": None}, {"delta": 0.0}, {"delta": "no"}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            QueryMonitor.calibrate(STREAMS, MemoryStore(), alpha=0.05, **wrong)


@pytest.mark.parametrize(
    "streams",
    [None, 3, "days", [], [(day(1),)], [day(1)], [(day(1), model(day(1)), [0.0])], [(day(1)[:0], day(1)[:0])]],
)
def test_what_are_no_streams_is_refused(streams):
    with pytest.raises(ConfigurationError, match="streams"):
        QueryMonitor.calibrate(streams, MemoryStore(), alpha=0.05)


@pytest.mark.parametrize("delay", [None, 5.0, (5.0, 5.0), (0.0, 5.0), (9.0, 5.0), (1.0, float("inf"))])
def test_a_delay_must_hide_the_moment(saved, delay):
    with pytest.raises(ConfigurationError, match="delay"):
        QueryMonitor.load(saved, MemoryStore(), delay=delay)


def test_in_a_guard_the_flagged_call_is_answered_and_the_account_ends_later():
    network, clock = guarded_model(), Clock()
    streams = [(x, network(x).detach()) for x in (rows(20, 100 + i)[0] for i in range(60))]
    monitor = QueryMonitor.calibrate(streams, MemoryStore(), alpha=0.05, key=KEY, clock=clock)
    guard = Guard.calibrate(network, rows(300, 2), detectors=[Energy()], alpha=0.05, fit=rows(200, 1), queries=monitor)
    x = rows(1, 5)[0] + 0.01 * torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    quiet = guard(x, principal="alice").outputs
    assert monitor.standing("alice").flagged and torch.allclose(quiet, network(x), equal_nan=True)
    clock.now += 1000
    refused = guard(x, principal="alice")
    assert not refused.accepted.any() and refused.reasons[0] == ("queries: suspended",)
    assert guard(rows(5, 6)[0], principal="bob").accepted.any()
    monitor._store.run = None  # a store that is away
    assert guard(x, principal="bob").reasons[0][0].startswith("error: queries failed")


def test_more_classes_than_an_account_counts_are_refused_at_calibration():
    """Planted violation: an error of struct at the first row of a class beyond 32,767."""
    streams = [(x, torch.zeros(len(x), 2**15)) for x, _ in days(2)]
    with pytest.raises(ConfigurationError, match="at most 32767 classes"):
        check_streams(streams)


def test_any_name_that_a_front_end_can_make_is_an_account():
    streams = days(60)
    with QueryMonitor.calibrate(streams, MemoryStore(), alpha=0.05) as monitor:
        x = probes(150)
        assert monitor.watch("\ud800", x, model(x)).flagged and not monitor.standing("\ud801").flagged


def test_steps_that_32_bits_do_not_hold_are_steps():
    """Planted violation: in float64, the queries of a finite difference passed for one that is asked again."""
    streams = [(x.double(), model(x).double()) for x, _ in days(60)]
    with QueryMonitor.calibrate(streams, MemoryStore(), alpha=0.05) as monitor:
        x = torch.full((40, FEATURES), 0.3, dtype=torch.float64)
        again = monitor.watch("retries", x, model(x.float()).double())
        tiny = x + 1e-12 * torch.arange(40, dtype=torch.float64)[:, None]
        moved = monitor.watch("eve", tiny, model(x.float()).double())
        assert not again.flagged and moved.flagged and moved.score > 2 * again.score
