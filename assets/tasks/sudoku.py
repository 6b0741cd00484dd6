"""4x4 sudokus as text: four lines of digits, 0 is a blank."""


def check(prompt: str, answer: str) -> bool:
    """The grid is filled, valid, and keeps the givens."""
    puzzle, grid = prompt.split("\n"), answer.split("\n")
    if [len(row) for row in puzzle] != [4] * 4 or len(grid) != 4 or any(sorted(row) != list("1234") for row in grid):
        return False
    columns = ["".join(row[c] for row in grid) for c in range(4)]
    boxes = [grid[r][c : c + 2] + grid[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
    keeps = all(
        given in ("0", cell)
        for row, filled in zip(puzzle, grid, strict=True)
        for given, cell in zip(row, filled, strict=True)
    )
    return keeps and all(sorted(unit) == list("1234") for unit in columns + boxes)
