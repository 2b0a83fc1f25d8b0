"""The main job: take real data, attack it, defend it with every room, show the evidence."""

from aidefend.demo.run import run

__all__ = ["run"]
