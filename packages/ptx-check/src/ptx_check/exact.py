"""Floating point stated with rational numbers: what the tests of the table compare with.

Shares no code with the table: a number is taken apart into sign, exponent and fraction, computed with exactly, and
rounded once, to nearest even.
"""

import math
from fractions import Fraction

# Bits of the fraction and of the exponent.
FORMATS = {"f16": (10, 5), "bf16": (7, 8), "f32": (23, 8)}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def value(bits: int, kind: str) -> Fraction | float:
    """The number, as a Fraction; infinities, NaN and -0 as floats."""
    fraction_bits, exponent_bits = FORMATS[kind]
    sign = -1 if bits >> (fraction_bits + exponent_bits) & 1 else 1
    exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = bits & ((1 << fraction_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0 and fraction == 0:
        return -0.0 if sign < 0 else Fraction(0)
    whole = fraction + (1 << fraction_bits if exponent else 0)
    return sign * whole * Fraction(2) ** (max(exponent, 1) - bias - fraction_bits)


def bits(number: Fraction | float, kind: str) -> int:
    """The nearest number of the format, ties to even; NaN is the canonical one."""
    fraction_bits, exponent_bits = FORMATS[kind]
    top = 1 << (fraction_bits + exponent_bits)
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    if isinstance(number, float):
        if math.isnan(number):
            return NAN[kind]
        if math.isinf(number):
            return infinity | (top if number < 0 else 0)
        if number == 0:
            return top if math.copysign(1, number) < 0 else 0
        number = Fraction(number)
    sign, size = (top if number < 0 else 0), abs(number)
    if size == 0:
        return 0
    lowest = 2 - (1 << (exponent_bits - 1))  # exponent of the smallest normal number
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length() - 1, lowest - 1)
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    exponent = max(exponent, lowest)
    unit = Fraction(2) ** (exponent - fraction_bits)
    count, rest = divmod(size, unit)
    count += rest * 2 > unit or (rest * 2 == unit and count % 2 == 1)
    # A carry into the exponent is an addition of integers; beyond the largest number it gives infinity.
    result = int(count) + ((exponent - lowest) << fraction_bits)
    return sign | min(result, infinity)


def is_special(*numbers: Fraction | float) -> bool:
    """Whether one is infinite or NaN, where rules of its own hold."""
    return any(isinstance(x, float) and (math.isnan(x) or math.isinf(x)) for x in numbers)


def negative(number: Fraction | float) -> bool:
    return math.copysign(1, number) < 0 if isinstance(number, float) else number < 0


def add(x: Fraction | float, y: Fraction | float) -> Fraction | float:
    if is_special(x, y):
        return float(x) + float(y)
    total = Fraction(x) + Fraction(y)
    if total == 0 and negative(x) and negative(y):
        return -0.0  # only the sum of two negative zeros is one, when rounding to nearest
    return total


def multiply(x: Fraction | float, y: Fraction | float) -> Fraction | float:
    if is_special(x, y):
        signs = math.copysign(1, -1 if negative(x) != negative(y) else 1)
        zero = x == 0 or y == 0
        return math.nan if zero or math.isnan(x) or math.isnan(y) else signs * math.inf
    product = Fraction(x) * Fraction(y)
    return -0.0 if product == 0 and negative(x) != negative(y) else product


def fused(x: Fraction | float, y: Fraction | float, z: Fraction | float) -> Fraction | float:
    return add(multiply(x, y), z)
