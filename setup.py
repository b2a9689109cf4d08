from configparser import ConfigParser

from setuptools import setup

ini = ConfigParser()
ini.read("settings.ini")
cfg = ini["DEFAULT"]
extras = {
    k.removesuffix("_requirements"): v.split()
    for k, v in cfg.items()
    if k.endswith("_requirements")
}
setup(version=cfg["version"], install_requires=cfg["requirements"].split(), extras_require=extras)
