"""`animesion teachers`: rank trained networks as teachers for distillation."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: animesion teachers --data datasets/faces runs/a runs/b")
@click.argument("checkpoints", metavar="RUN|FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", required=True, help="A built dataset, class folders, or label CSVs.")
@click.option("--images", type=click.Path(path_type=Path), help="With label CSVs: root of their paths.")
@click.option("--split", default="train", show_default=True, help="Split to measure on.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print all numbers as JSON.")
def teachers(
    checkpoints: tuple[Path, ...], data: str, images: Path | None, split: str, device: str, as_json: bool
) -> None:
    """Rank trained networks as teachers by Ratio 1-2 of their logits: the lower, the better (arXiv 2605.15689).

    This takes one pass over the split. The ratio changes when logits are shifted by a constant; the margin, which is
    listed too, does not.
    """
    import json

    from animesion.cli.progress import one_task
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(data, *checkpoints)
    with torch_required():
        from animesion_training.analysis import teachers
        from animesion_training.data import open_data
        from animesion_training.distributed import distributed_context

    opened = open_data(data, images=images)
    with distributed_context(device) as context, one_task("teachers"):
        ranked = teachers.rank(checkpoints, opened, split, context)
    if as_json:
        rows = [
            {"rank": i, "checkpoint": str(each.path), "model": each.name, "top_1": each.top_1, **each.statistics}
            for i, each in enumerate(ranked, 1)
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f"{'':>2}  {'ratio 1-2':>9}  {'margin':>7}  {'entropy':>7}  {'top-1':>6}  checkpoint")
    for i, each in enumerate(ranked, 1):
        facts = each.statistics
        ratio = "-" if facts["ratio_1_2_normal"] is None else f"{facts['ratio_1_2_normal']:.3f}"
        margin, entropy = facts["margin_1_2"] or 0.0, facts["entropy"] or 0.0
        click.echo(
            f"{i:>2}  {ratio:>9}  {margin:>7.3f}  {entropy:>7.3f}  {100 * each.top_1:>5.1f}%  {each.path} ({each.name})"
        )
