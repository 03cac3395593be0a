"""A run's traces and metrics, as a collector receives them: an OTLP/HTTP receiver on loopback and a run that loses trainers.

    python=$(scripts/setup.sh --peers)
    $python scripts/test-traces.py --bin target/debug           one trace for the whole run, with what happened in it
    $python scripts/test-traces.py --bin target/debug --dead    a collector that is not there, or never answers, costs a run nothing
    $python scripts/test-traces.py --self-test                  the receiver and the checks, on requests made by hand; needs no binaries

The run is elastic (`--nodes 2:3`); the trainer of its last node is killed in mid-training, three times. Then: one trace id; spans of the
coordinator, of every agent and of every trainer; every parent known, but for children of the killed processes, whose own open spans died with
them; a `recovery` for each kill, whose parts follow each other and add up to the outage; no recovery that ends before anybody has stepped again;
no name of a case or a file in any attribute; the metrics of scripts/observability/metrics.py by their OTLP names.

The outage is measured on the survivors' own spans: from the end of the last `step` that one completed in the old generation to the end of the
first that it completed in a later one; their mean. A step is complete if the optimiser ran in it: one that was cut short has a span, too, and does
not count. The coordinator counts from when it hears of a step. On a machine that is busy with other things a message may wait a tenth of a second,
so that the median over the kills is held to 5 %, and each is told. A kill whose next generation took no step, because a trainer was ready again
before, is not counted: no `recovery` tells of it. Prints the trace as a tree.

What is here: the runs. What is asked of their spans and metrics is observability/traces.py. Linux; of other packages only opentelemetry-proto
(scripts/locks/peers.txt).
"""

import argparse
import os
import pathlib
import signal
import socket
import statistics
import sys
import tempfile
import time

sys.dont_write_bytecode = True  # the modules are beside the sources
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "observability"))
try:
    from receiver import Receiver, Silent, newest_step
    from traces_self_test import self_test
except ImportError as missing:
    sys.exit(f"test-traces: error: {missing}: run it with the python that `scripts/setup.sh --peers` prints")
from basics import Failed  # noqa: E402
from runs import Launched, Processes, synthesise  # noqa: E402
from traces import Trace, judged  # noqa: E402
from tree import tree  # noqa: E402

# Every step is traced.
SETS = ["loss.warmup_epochs=0", "validate.every=200", "checkpoint.every=100", "telemetry.step_spans_s=0"]
# What is known is sent soon: little of it dies with the trainer.
EXPORT = {"OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_METRIC_EXPORT_INTERVAL": "1000"}
# With a collector that is not there: what a run's steps may take longer, and its end. There the trainers, the agents, the coordinator and the launcher
# go one after the other, and each gives its last spans 0.6 s, the coordinator its last metrics as long again: five times 0.6 s.
STEPS_MORE = (1.1, 1.0)
END_MORE_S = 3.0


def start(binaries, data, folder, nodes, iterations, environment):
    arguments = ["--config", "demo", "--data", data, "--run", folder / "run", "--nodes", nodes]
    return Launched(binaries, folder, arguments, [*SETS, f"train.iterations={iterations}"], environment)


def traced(binaries, iterations, kill_at):
    receiver = Receiver()
    with tempfile.TemporaryDirectory(prefix="cpcr-traces-") as folder:
        folder = pathlib.Path(folder)
        data, names = synthesise(binaries, folder)
        run = start(binaries, data, folder, "2:3", iterations, EXPORT | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint})
        processes = Processes(run.process.pid)

        def victim(spans):
            """The trainer of the last node, once it is known to step. That node is never rank 0, which writes checkpoints."""
            stepping = {span.pid for span in spans if span.name == "optimiser"}
            last = max((life.node for life in processes.all() if life.role == "worker"), default=0)
            return next((life for life in processes.all() if life.role == "trainer" and life.node == last and life.killed_at is None
                         and life.gone_at is None and life.pid in stepping), None)
        try:
            for at in kill_at:
                receiver.wait_for(lambda spans, at=at: newest_step(spans) >= at, run, f"step {at}")
                life = receiver.wait_for(victim, run, "a trainer that steps on the last node")
                life.killed_at = time.time()
                os.kill(life.pid, signal.SIGKILL)
                print(f"killed the trainer of node {life.node} at step {newest_step(receiver.spans)}", flush=True)
            run.ended()
        finally:
            run.stop()
            processes.close()
        receiver.close()
        lives = processes.all()
    trace = Trace(receiver.spans)
    if not trace.spans:
        raise Failed("no span came")
    print("\n".join(tree(trace)))
    print(f"\n{len(trace.spans)} spans in {sum(receiver.requests.values())} requests ("
          + ", ".join(f"{count} of {kind}" for kind, count in sorted(receiver.requests.items())) + f"); trace {trace.spans[0].trace}")
    return judged(trace, lives, receiver.metrics, names, receiver.refused)


def dead(binaries, iterations, times):
    # Bound and not listened on: nobody else gets the port meanwhile, and connections are refused.
    nobody = socket.socket()
    nobody.bind(("127.0.0.1", 0))
    silent = Silent()
    kinds = {"no collector": {}, "nobody listens": {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}"},
             "never answers": {"OTEL_EXPORTER_OTLP_ENDPOINT": silent.endpoint}}
    steps, ends, exits = ({kind: [] for kind in kinds} for _ in range(3))
    with tempfile.TemporaryDirectory(prefix="cpcr-traces-") as folder:
        data, _ = synthesise(binaries, pathlib.Path(folder))
        # In turn: what else the machine does hits all alike.
        for number in range(times):
            for kind, more in kinds.items():
                own = pathlib.Path(folder) / f"{number}-{kind.replace(' ', '-')}"
                own.mkdir()
                began = time.time()
                run = start(binaries, data, own, "2", iterations, (EXPORT | more) if more else {})
                processes = Processes(run.process.pid)
                try:
                    run.ended()
                finally:
                    run.stop()
                    processes.close()
                done = next((when for when, line in run.lines if f"step {iterations}/{iterations} " in line), None)
                if done is None:
                    raise Failed(f"{kind}: the launcher did not say that step {iterations} was done")
                steps[kind].append(done - began)
                ends[kind].append(run.ended_at - done)
                last = {}
                for life in processes.all():
                    if life.gone_at is not None:
                        last[life.role] = max(last.get(life.role, 0.0), life.gone_at - done)
                last["launcher"] = run.ended_at - done
                exits[kind].append(last)
                print(f"{kind}: all steps done after {steps[kind][-1]:.2f} s, ended with 0 {ends[kind][-1]:.2f} s later", flush=True)
    nobody.close()
    silent.close()
    wrong = []
    # What else the machine does only ever makes it longer: the shortest tells the most.
    without, end_without = min(steps["no collector"]), statistics.median(ends["no collector"])
    for kind in kinds:
        shortest, end = min(steps[kind]), statistics.median(ends[kind])
        roles = {role: statistics.median(gone[role] for gone in exits[kind] if role in gone) for role in exits[kind][0]}
        print(f"  {kind}: shortest of {times} to the last step {shortest:.2f} s; from there to the end {end:.2f} s in the median: "
              + ", ".join(f"{role} {seconds:.2f}" for role, seconds in sorted(roles.items(), key=lambda each: each[1])))
        if shortest > without * STEPS_MORE[0] + STEPS_MORE[1]:
            wrong.append(f"{kind}: {iterations} steps take {shortest:.2f} s, {without:.2f} s without")
        if end > end_without + END_MORE_S:
            wrong.append(f"{kind}: after the last step a run takes {end:.2f} s, {end_without:.2f} s without; {END_MORE_S} s more are allowed")
    if not silent.accepted:
        wrong.append("never answers: nobody connected to it, so nothing was tested")
    print(f"  never answers: {silent.accepted} connections")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, help="the folder of cpcr, cpcr-launch and cpcr-engine")
    parser.add_argument("--dead", action="store_true", help="only: what a dead collector costs")
    parser.add_argument("--self-test", action="store_true", help="only: the receiver and the checks")
    parser.add_argument("--iterations", type=int, help="steps of a run; default 700, with --dead 150")
    # Between validations, which come every 200 steps and after which an outage would begin with no step.
    parser.add_argument("--kill-at", type=int, nargs="+", default=[110, 310, 510], help="the steps at which a trainer is killed")
    parser.add_argument("--times", type=int, default=5, help="with --dead: runs of each kind")
    arguments = parser.parse_args()
    if not arguments.self_test and not arguments.bin:
        parser.error("--bin DIR, or --self-test")
    try:
        if arguments.self_test:
            wrong = self_test()
        elif arguments.dead:
            wrong = dead(arguments.bin.resolve(), arguments.iterations or 150, arguments.times)
        else:
            wrong = traced(arguments.bin.resolve(), arguments.iterations or 700, arguments.kill_at)
    except Failed as failed:
        wrong = [str(failed)]
    for complaint in wrong:
        print(f"FAILED: {complaint}", file=sys.stderr)
    print(f"test-traces: {'failed, ' + str(len(wrong)) + ' complaints' if wrong else 'passed'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
