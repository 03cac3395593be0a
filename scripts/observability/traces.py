"""What is asked of a run's spans and metrics: who is whose child, names and attributes, recoveries, privacy, the list of metrics.

Every check returns its complaints and what there is to tell. scripts/test-traces.py says what they mean together; traces_self_test.py
shows each of them something wrong. What it is not: the receiver (receiver.py), nor a run (runs.py). The standard library only.
"""

import collections
import re
import statistics

from basics import Failed
from metrics import BESIDES, MAY_BE_ABSENT, METRICS, PHASES

RECOVERY = ("detect", "fence", "regroup", "restore", "first_step")
# Whose child a span is, by names.
PARENTS = {
    "run": {"launch"}, "generation": {"run"}, "recovery": {"run"}, "agent": {"run"}, "trainer": {"agent"},
    "member": {"generation"}, "epoch": {"member"}, "step": {"epoch"}, "validation": {"member", "epoch"},
    "checkpoint": {"member", "epoch", "step"}, "checkpoint_upload": {"checkpoint"},
    **{name: {"recovery"} for name in RECOVERY}, **{name: {"step"} for name in PHASES},
}
WANTED = {
    "generation": {"cpcr.generation", "cpcr.world"}, "member": {"cpcr.generation", "cpcr.rank", "cpcr.world"}, "agent": {"cpcr.node"},
    "recovery": {"cpcr.generation", "cpcr.cause", "cpcr.node", "cpcr.rank", "cpcr.outage_s"}, "step": {"step", "rank"},
}
NUMBERS = {"cpcr.generation", "cpcr.world", "cpcr.rank", "cpcr.node", "cpcr.outage_s", "step", "rank"}
RESOURCE = {"service.name", "service.version", "service.instance.id", "cpcr.role", "cpcr.run", "host.name", "process.pid"}
# What looks like a file of data in a value; but not the objects of a checkpoint, whose names are always these.
FILE_NAME = re.compile(r"[\w-]\.(?:parquet|h5|nii(?:\.gz)?|png|jsonl?|safetensors)\b")
CHECKPOINT = re.compile(r"(?<![\w.-])(?:(?:model|optimizer)\.safetensors|state\.json)\b")
# Clocks of one machine; spans are timed in nanoseconds, some parts were seconds in floating point before.
TOUCH_S = 0.001
OUTAGE_OFF_MAX = 0.05
# Before this, the coordinator cannot have heard of a step.
EARLY_S_MAX = 0.05


class Trace:
    """All spans of a run, and who is whose child."""

    def __init__(self, spans):
        self.spans = spans
        self.by_id = {span.id: span for span in spans}
        self.children = collections.defaultdict(list)
        for span in spans:
            self.children[span.parent].append(span)
        for family in self.children.values():
            family.sort(key=lambda span: span.start)

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def above(self, span, name):
        """The nearest span of that name above; `None` if that is not known."""
        while span is not None and span.name != name:
            span = self.by_id.get(span.parent)
        return span


def of_one_trace(trace, lives):
    """Complaints about identities: trace ids, roots, parents, processes. And what to tell."""
    wrong, told = [], []
    ids = sorted({span.trace for span in trace.spans})
    if len(ids) != 1:
        wrong.append(f"{len(ids)} trace ids, not one: " + ", ".join(
            f"{each} ({', '.join(sorted({s.resource.get('cpcr.role', '?') for s in trace.spans if s.trace == each}))})" for each in ids))
    if len(trace.by_id) != len(trace.spans):
        wrong.append(f"{len(trace.spans) - len(trace.by_id)} spans came twice")
    roots = [span for span in trace.spans if not span.parent]
    if [span.name for span in roots] not in (["run"], ["launch"]):
        wrong.append(f"roots are {[span.name for span in roots]}, not one `run` (or the launcher's `launch` above it)")
    if not trace.named("run"):
        wrong.append("no span `run`")
    killed = {life.pid for life in lives if life.killed_at is not None}
    orphans = collections.Counter()
    for span in trace.spans:
        if span.parent and span.parent not in trace.by_id:
            orphans[(span.pid in killed, span.name)] += 1
    for (expected, name), count in sorted(orphans.items()):
        if not expected:
            wrong.append(f"{count} spans `{name}` whose parent nobody sent")
    told.append(f"children of the killed processes whose parents died with them: {sum(n for (of_killed, _), n in orphans.items() if of_killed)}"
                + "".join(f", {name} {n}" for (of_killed, name), n in sorted(orphans.items()) if of_killed))
    for life in lives:
        own = [span for span in trace.spans if span.pid == life.pid]
        where = f"{life.role} {life.pid}" + (f" of node {life.node}" if life.node is not None else "") + (" (killed)" if life.killed_at else "")
        if not own:
            wrong.append(f"no span of the {where}")
        elif {span.resource.get("cpcr.role") for span in own} != {life.role}:
            wrong.append(f"the {where} calls itself {sorted({str(span.resource.get('cpcr.role')) for span in own})}")
        elif life.node is not None and {str(span.resource.get("cpcr.node")) for span in own} != {str(life.node)}:
            wrong.append(f"the {where} says that its node is {sorted({str(span.resource.get('cpcr.node')) for span in own})}")
        told.append(f"{where}: {len(own)} spans")
    return wrong, told


def of_shape(trace):
    """Complaints about names, parents, attributes and resources; unknown names are told."""
    wrong, unknown = collections.Counter(), collections.Counter()
    for span in trace.spans:
        parent = trace.by_id.get(span.parent)
        if span.name not in PARENTS and span.name != "launch":
            unknown[span.name] += 1
        elif parent is not None and parent.name not in PARENTS.get(span.name, ()):
            wrong[f"`{span.name}` below `{parent.name}`"] += 1
        lacks = WANTED.get(span.name, set()) - set(span.attributes)
        if lacks and not (span.name == "recovery" and span.attributes.get("cpcr.cause") in ("joined", "given-back")):
            wrong[f"`{span.name}` without {', '.join(sorted(lacks))}"] += 1
        texts = sorted(name for name in NUMBERS & set(span.attributes) if not isinstance(span.attributes[name], (int, float)))
        if texts:
            wrong[f"`{span.name}` has {', '.join(texts)} as text, not as a number"] += 1
        if span.end < span.start:
            wrong[f"`{span.name}` ends before it begins"] += 1
        role = span.resource.get("cpcr.role")
        lacks = RESOURCE - set(span.resource) - ({"cpcr.run"} if role == "launcher" else set())
        if role in ("worker", "trainer") and "cpcr.node" not in span.resource:
            lacks.add("cpcr.node")
        if lacks:
            wrong[f"the resource of a {role} lacks {', '.join(sorted(lacks))}"] += 1
    return [f"{what}: {count} spans" for what, count in sorted(wrong.items())], [f"other spans: {name} {n}" for name, n in sorted(unknown.items())]


class Steps:
    """The steps that were completed: (end, generation, pid), in order."""

    def __init__(self, trace):
        ran = {span.parent for span in trace.spans if span.name == "optimiser"}
        self.ends = []
        for span in trace.named("step"):
            member = trace.above(span, "member")
            if span.id in ran and member is not None:
                self.ends.append((span.end, int(member.attributes["cpcr.generation"]), span.pid))
        self.ends.sort()

    def outage(self, lives, killed):
        """(mean seconds between a survivor's steps, the last before the kill, the first after, generation before, how many survivors)"""
        gone = {life.pid for life in lives if life.killed_at is not None and life.killed_at <= killed.killed_at}
        ends = [end for end in self.ends if end[2] not in gone]
        before = [end for end in ends if end[0] <= killed.killed_at]
        if not before:
            raise Failed("no completed step of a survivor before the kill")
        old = before[-1][1]
        last = {pid: end for end, generation, pid in ends if generation == old}
        first = {}
        for end, generation, pid in ends:
            if generation > old and pid in last:
                first.setdefault(pid, end)
        if not first:
            raise Failed("no completed step of a survivor after the kill")
        gaps = [first[pid] - last[pid] for pid in first]
        return statistics.fmean(gaps), max(last[pid] for pid in first), min(first.values()), old, len(first)


def of_recoveries(trace, lives):
    """Complaints about the recoveries from the kills and others, and their figures."""
    wrong, told, off = [], [], []
    steps = Steps(trace)
    kills = sorted((life for life in lives if life.killed_at is not None), key=lambda life: life.killed_at)
    for killed in kills:
        complaints, figures, deviation = of_recovery(trace, lives, steps, killed)
        wrong += complaints
        told += figures
        off += [deviation] if deviation is not None else []
    if len(off) * 2 <= len(kills):
        wrong.append(f"recoveries: of {len(kills)} kills only {len(off)} could be measured")
    if off:
        middle = statistics.median(abs(each) for each in off)
        told.append(f"recoveries: {', '.join(f'{each * 100:+.1f}' for each in off)} % off the outages, {middle * 100:.1f} % in the median")
        if middle > OUTAGE_OFF_MAX:
            wrong.append(f"recoveries: their parts are {middle * 100:.1f} % off the outages in the median, more than {OUTAGE_OFF_MAX * 100:.0f} %")
    for recovery in trace.named("recovery"):
        generation = recovery.attributes.get("cpcr.generation", 0)
        first = next((end for end, of, _ in steps.ends if of > generation), None)
        if first is not None and recovery.end < first - EARLY_S_MAX:
            wrong.append(f"recovery: that of generation {generation} ({recovery.attributes.get('cpcr.cause')}) ends {(first - recovery.end) * 1e3:.1f} ms before "
                         "anybody has stepped in a later one")
    return wrong, told


def of_recovery(trace, lives, steps, killed):
    """Complaints about the recovery from one kill, its figures, and how far its parts are off the outage."""
    wrong, told = [], []
    outage, last, first, old, survivors = steps.outage(lives, killed)
    told.append(f"generation {old}: outage {outage * 1e3:.1f} ms in the mean of {survivors} survivors, from their last completed step "
                f"({(last - killed.killed_at) * 1e3:+.1f} ms from the kill) to the first of a later one ({(first - killed.killed_at) * 1e3:+.1f} ms)")
    losses = [span for span in trace.named("recovery") if span.attributes.get("cpcr.generation") == old
              and span.attributes.get("cpcr.cause") not in ("joined", "given-back")]
    if not losses and not any(generation == old + 1 for _, generation, _ in steps.ends):
        # Its next generation is known to the trace, and took no step: a member joined before. Then the run has no outage of its own to tell.
        return wrong, told + [f"  generation {old + 1}, which followed, took no step: not counted"], None
    if len(losses) != 1:
        return wrong + [f"{len(losses)} recoveries from a loss of generation {old}, in which a trainer was killed, not one"], told, None
    recovery = losses[0]
    said = recovery.attributes
    if said.get("cpcr.cause") != "trainer-killed" or said.get("cpcr.node") != killed.node:
        wrong.append(f"recovery: cause {said.get('cpcr.cause')} on node {said.get('cpcr.node')}, not trainer-killed on node {killed.node}")
    parts = trace.children[recovery.id]
    if [part.name for part in parts] != list(RECOVERY):
        # Empty parts begin together: their order is then not told by their times.
        parts = sorted(parts, key=lambda part: (part.start, part.end, RECOVERY.index(part.name) if part.name in RECOVERY else 9))
    if [part.name for part in parts] != list(RECOVERY):
        return wrong + [f"recovery: its parts are {[part.name for part in parts]}, not {list(RECOVERY)}"], told, None
    edges = [recovery.start, *(part.end for part in parts)]
    for edge, part in zip(edges, parts):
        if abs(part.start - edge) > TOUCH_S:
            wrong.append(f"recovery: `{part.name}` begins {(part.start - edge) * 1e3:+.2f} ms from the end of what is before it")
    if abs(parts[-1].end - recovery.end) > TOUCH_S:
        wrong.append(f"recovery: its parts end {(parts[-1].end - recovery.end) * 1e3:+.2f} ms from its own end")
    total = sum(part.seconds for part in parts)
    deviation = total / outage - 1
    told.append("  recovery: " + " + ".join(f"{part.name} {part.seconds * 1e3:.1f}" for part in parts) + f" = {total * 1e3:.1f} ms, "
                f"{deviation * 100:+.1f} % of the outage; it begins {(recovery.start - last) * 1e3:+.1f} ms and ends {(recovery.end - first) * 1e3:+.1f} ms "
                f"after those steps; it says {said.get('cpcr.outage_s', float('nan')) * 1e3:.1f} ms")
    if abs(said.get("cpcr.outage_s", 0.0) - total) > OUTAGE_OFF_MAX * total:
        wrong.append(f"recovery: cpcr.outage_s is {said.get('cpcr.outage_s')}, its parts are {total:.4f} s together")
    return wrong, told, deviation


def values(thing):
    """Every string in an attribute's value."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield str(key)
            yield from values(value)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from values(value)
    elif isinstance(thing, bytes):
        yield thing.decode(errors="replace")
    elif isinstance(thing, str):
        yield thing


def of_privacy(spans, metrics, names):
    """Complaints about values that tell of cases or files."""
    wrong = collections.Counter()
    # Long ones first: the shortest that is found would do, the longest says more.
    forbidden = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
    known, seen = {}, 0
    things = [(f"span `{s.name}`", [s.name, s.attributes, s.events, s.status, s.resource]) for s in spans]
    things += [(f"metric {m.name}", [m.attributes, m.resource]) for m in metrics]
    for where, thing in things:
        for text in values(thing):
            seen += 1
            if text not in known:
                known[text] = forbidden.search(text) or FILE_NAME.search(CHECKPOINT.sub("", text))
            if known[text]:
                wrong[f"{where} says '{text if len(text) < 200 else text[:200] + '...'}' ({known[text][0]})"] += 1
    told = f"{seen} strings, {len(known)} different ones, looked through for {len(names)} names of cases and files"
    return [f"{what}: {count} times" for what, count in wrong.most_common(10)], [told]


def of_metrics(metrics):
    """Complaints about the metrics' names, kinds and labels."""
    wrong, seen = [], set()
    for name in sorted({metric.name for metric in metrics}):
        own = [metric for metric in metrics if metric.name == name]
        plain_name = name.replace(".", "_")
        known = next((each for each in (plain_name, plain_name + "_total") if each in METRICS | BESIDES), None)
        if known is None or "_" in name or not name.startswith("cpcr."):
            wrong.append(f"metric {name}: not in the list, with dots")
            continue
        seen.add(known)
        kind, labels = (METRICS | BESIDES)[known]
        if {metric.kind for metric in own} != {kind}:
            wrong.append(f"metric {name}: a {sorted({metric.kind for metric in own})}, not a {kind}")
        if any(set(attributes) != set(labels) for metric in own for attributes in metric.attributes):
            wrong.append(f"metric {name}: attributes other than {labels}")
    lacks = set(METRICS) - seen - MAY_BE_ABSENT
    if lacks:
        wrong.append("metrics that never came: " + ", ".join(sorted(lacks)))
    last = next((metric.values[-1] for metric in reversed(metrics) if metric.name == "cpcr.steps.done" and metric.values), None)
    return wrong, [f"{len(seen & set(METRICS))} of {len(METRICS)} metrics came; cpcr.steps.done was {last} at last"]


def judged(trace, lives, metrics, names, refused=()):
    """Every complaint, after what there is to tell was printed."""
    wrong = [f"the receiver refused {line}" for line in refused]
    for check, arguments in ((of_one_trace, (trace, lives)), (of_shape, (trace,)), (of_recoveries, (trace, lives)),
                             (of_privacy, (trace.spans, metrics, names)), (of_metrics, (metrics,))):
        try:
            complaints, told = check(*arguments)
        except Failed as failed:
            complaints, told = [str(failed)], []
        wrong += complaints
        for text in told:
            print(f"  {text}")
    return wrong
