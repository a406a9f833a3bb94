"""What the study's trainings cost: whose steps are timed, and sums over all that a row takes."""

import functools
import statistics

from msad_kd.config.build import build_config
from projects.Shapes.cells import recipe_of
from projects.Shapes.grid import PLACEHOLDER


@functools.cache
def config_recipe(config):
    """The recipe of a config's training, and its iterations."""
    meant = build_config(config, ["MODEL.DEVICE", "cpu"])
    return recipe_of(meant), meant.SOLVER.MAX_ITER


def training_recipes(cells, names):
    """What trains some rows, and what made their checkpoints, for `measure.py steps`.

    Returns:
        list of dicts with `key` (the recipe's, see `Cell`), `config` and `options`: one of those
        that cost the same. Left out is what needs a checkpoint that is not there.
    """
    recipes = {}
    for cell in cells.values():
        if cell.row.name in names:
            for config in cell.row.trained_by:
                each = {"config": config, "options": ["MODEL.WEIGHTS", ""]}
                recipes.setdefault(config_recipe(config)[0], each)
            if not cell.row.checkpoint and all(cells[key].weights.is_file() for key in cell.needs):
                recipes.setdefault(
                    cell.recipe, {"config": cell.row.config, "options": cell.options}
                )
    return [{"key": key, **recipe} for key, recipe in recipes.items()]


def median_seconds(results):
    """Recipe to the time of a step."""
    seconds = results["steps"].get("seconds", {})
    return {recipe: statistics.median(each) for recipe, each in seconds.items()}


def training_costs(grid, cells, results):
    """What rows cost, in seconds, as far as the steps were timed.

    Returns:
        dict, a row's name to (its own training, that and all before it). What several of those
        before it start or learn from counts once; for a row with another's checkpoint the training
        is that row's.
    """
    seconds = median_seconds(results)

    @functools.cache
    def find(name):  # two dicts of the parts' seconds: its own, and all
        row = grid.rows[name]
        cell = cells[f"{name}/{(row.seeds or (0,))[0]}"]
        needed = [cells[key].row.name for key in cell.needs]
        before = {part: cost for each in needed for part, cost in find(each)[1].items()}
        other = PLACEHOLDER.fullmatch(row.checkpoint)
        if other:
            own = find(other[1])[0]
        elif row.checkpoint:
            configs = {config: config_recipe(config) for config in row.trained_by}
            if not configs:
                raise KeyError(f"nobody knows what made '{row.checkpoint}'")
            own = {each: seconds[recipe] * count for each, (recipe, count) in configs.items()}
        else:
            own = {name: seconds[cell.recipe] * cell.iterations}
        return own, before | own

    costs = {}
    for name in grid.rows:
        try:
            costs[name] = tuple(sum(parts.values()) for parts in find(name))
        except KeyError:  # something of it was not timed
            continue
    return costs
