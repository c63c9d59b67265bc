"""RESULTS.md, from the records under bench/results. The facts that cost time stand in bench/results/facts.md."""

from bench import goals, model, records, tables
from bench.plot import draw

OUT = records.ROOT / "RESULTS.md"
INTRODUCTION = """# Results

Written by `python -m bench report` from the records under [bench/results](bench/results). Times are medians; the
spread is half the range between the quartiles. The roof is the least time that the machine's memory and torch's matrix
product, measured in the same run, allow for the work (a kernel can beat the product); on a CPU a copy and a read of
memory are timed just before and after what memory bounds. FLOPs and bytes are those of the mathematics. A peer is timed
on the same tensors in the same run, after its result was compared with ours.
"""


def write(results=None, out=OUT):
    """Writes RESULTS.md (and the plots it shows); returns its path."""
    results = results or records.RESULTS
    sections = [INTRODUCTION]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        sections += _device(folder, out.parent)
    facts = results / "facts.md"
    if facts.is_file():
        sections.append(facts.read_text().strip())
    out.write_text("\n\n".join(section.strip() for section in sections) + "\n")
    return out


def _device(folder, root):
    ops, whole = folder / "ops.json", folder / "model.json"
    if not ops.is_file() and not whole.is_file():
        return []
    pictures = draw(folder)
    sections = []
    for path in (ops, whole):
        if path.is_file():
            record = records.load(path)
            if not sections:
                sections.append(f"## {record['stamp']['device']}")
            sections.append(_stamp(record))
            sections.append(_ops(record) if record["kind"] == "ops" else _model(record))
    return [*sections, *(f"![{path.stem}]({path.relative_to(root)})" for path in pictures)]


def _stamp(record):
    stamp = record["stamp"]
    threads = f", {stamp['threads']} threads, {stamp['level']}" if stamp["threads"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    changed = " with uncommitted changes" if stamp["changed"] else ""
    return f"Commit {stamp['commit'][:12]}{changed}, {stamp['date']}{threads}; {versions}."


def _ops(record):
    roofs = record["roofs"]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in roofs["matmul"].items())
    memory = f"copy {roofs['copy'] / 1e9:.1f} GB/s, read {roofs['read'] / 1e9:.1f} GB/s"
    sections = [
        f"Roofs: {memory}; matrix product {rates}.",
        tables.markdown(tables.HEADER, [tables.cells(row) for row in record["rows"]]),
    ]
    if aims := goals.rows(record):
        sections += ["The same against what was aimed at:", tables.markdown(goals.HEADER, aims)]
    return "\n\n".join(sections)


def _model(record):
    return f"Qwen3-1.7B's widths, {record['layers']} layers.\n\n" + tables.markdown(
        model.HEADER, [model.cells(row) for row in record["rows"]]
    )
