"""A trace as indented lines, for people.

What it is not: a check, nor all spans: what repeats is summed up. The standard library only.
"""

import statistics

from metrics import PHASES

FEW = 3
# Each of these is told, however many there are.
ALWAYS = ("generation", "recovery")


def tree(trace):
    """The trace as indented lines. More than a few siblings of one name are told together."""
    begin = min(span.start for span in trace.spans)
    lines = []

    def line(depth, text, when):
        lines.append(f"{when:>26}  {'  ' * depth}{text}")

    def attributes(span):
        said = {**({"node": span.resource["cpcr.node"]} if span.name in ("trainer",) and "cpcr.node" in span.resource else {}),
                **span.attributes}
        told = ", ".join(f"{key.removeprefix('cpcr.')} {value:.4g}" if isinstance(value, float) else f"{key.removeprefix('cpcr.')} {value}"
                         for key, value in said.items() if isinstance(value, (str, int, float)) and key != "target")
        return f" ({told})" if told else ""

    def walk(spans, depth):
        kinds = {}
        for span in spans:
            kinds.setdefault(span.name, []).append(span)
        for name, own in sorted(kinds.items(), key=lambda kind: kind[1][0].start):
            if (len(own) > FEW and name not in ALWAYS) or (depth and name in PHASES):
                times = sorted(span.seconds * 1e3 for span in own)
                line(depth, f"{name} x{len(own)}", f"median {statistics.median(times):.1f}, max {times[-1]:.1f} ms")
                walk(sorted((child for span in own for child in trace.children[span.id]), key=lambda span: span.start), depth + 1)
            else:
                for span in own:
                    line(depth, f"{name}{attributes(span)}", f"+{span.start - begin:.3f} s, {span.seconds * 1e3:.1f} ms")
                    walk(trace.children[span.id], depth + 1)

    walk(trace.children[""], 0)
    lost = sorted((span for span in trace.spans if span.parent and span.parent not in trace.by_id), key=lambda span: span.start)
    if lost:
        line(0, f"below what died with pid {', '.join(map(str, sorted({span.pid for span in lost})))}:", "")
        walk(lost, 1)
    return lines
