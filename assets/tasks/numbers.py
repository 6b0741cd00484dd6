"""A number, and its digits in words: `372 is three seven two.`"""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def check(prompt: str, answer: str, suffix: str) -> bool:
    """The words are those of the digits, and nothing else is there."""
    digits = prompt.removesuffix(" is ")
    return suffix == "." and answer == " ".join(WORDS[int(digit)] for digit in digits)
