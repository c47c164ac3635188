"""Units of measure and currencies, each under one name: "km" is "kilometres", and neither is "miles"."""

from __future__ import annotations

__all__ = ["CURRENCIES", "other_unit", "unit"]

CURRENCIES = frozenset(("pound", "dollar", "euro", "yen", "yuan", "rupee", "rouble", "franc", "krw", "lira", "peso"))
"""Units that may stand before their number."""

_UNITS = """
kilometre kilometres kilometer kilometers km
metre metres meter meters
centimetre centimetres centimeter centimeters cm
millimetre millimetres millimeter millimeters mm
mile miles
yard yards
foot feet ft
inch inches
kilogram kilograms kilogramme kilogrammes kilo kilos kg
gram grams gramme grammes
milligram milligrams mg
tonne tonnes ton tons
pound pounds lb lbs gbp
ounce ounces oz
litre litres liter liters
millilitre millilitres milliliter milliliters ml
gallon gallons
pint pints
celsius centigrade c
fahrenheit f
kelvin
hectare hectares
acre acres
watt watts
kilowatt kilowatts kw
calorie calories kcal
joule joules
kilobyte kilobytes kb
megabyte megabytes mb
gigabyte gigabytes gb
terabyte terabytes tb
percent percentage pct
dollar dollars usd
euro euros eur
yen jpy
yuan renminbi cny
rupee rupees inr
rouble roubles ruble rubles
franc francs chf
krw
lira liras
peso pesos
"""
_NAMES = {word: line.split()[0] for line in _UNITS.strip().splitlines() for word in line.split()}


def unit(word: str) -> str:
    """The name of a unit; "" for a word that is none.

    word: in lower case.
    """
    return _NAMES.get(word, "")


def other_unit(a: str, b: str) -> bool:
    """Whether two words are units, and not the same.

    a, b: in lower case.
    """
    return "" not in (first := unit(a), other := unit(b)) and first != other
