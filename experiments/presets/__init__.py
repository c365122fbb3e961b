"""Presets: functions that return a complete `Run`. To add one, write it and name it here."""

from experiments.presets.newsroom import joint, newsroom, smoke
from experiments.presets.upworthy import logs, upworthy, upworthy_smoke, upworthy_smollm2

PRESETS = {
    "newsroom": newsroom,
    "joint": joint,
    "smoke": smoke,
    "logs": logs,
    "upworthy": upworthy,
    "upworthy_smoke": upworthy_smoke,
    "upworthy_smollm2": upworthy_smollm2,
}
