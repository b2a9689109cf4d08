"""Kinds of weights from outside."""

from kinds import Kind

KINDS: list[Kind] = []
