"""Which globals a pickle may name. None is ever imported or called; those that would do harm are still an error.

- A class or a function of Python's standard library is refused, unless it is one of the plain types listed here.
- Packages whose functions run code, read other pickles or use the network are refused.
- A function of torch or NumPy that the pickle calls is refused, unless it is one that rebuilds an object.
- Everything else is described: the classes of training frameworks, of configurations, of the user's own script.

Sources: what ``pickle`` writes for the types of the standard library, of NumPy 1 and 2 and of torch; the globals that
picklescan and fickling report as unsafe.
"""

from __future__ import annotations

import sys

BUILTINS = frozenset(
    """
    bool bytearray bytes complex dict float frozenset getattr int list long object range set slice str tuple type unicode
    xrange
    """.split()  # noqa: SIM905  long, unicode and xrange are what pickles for Python 2 name
)
# Module of the standard library -> names in it that may lie beside weights.
PLAIN_TYPES = {
    "__torch__": {"Module"},  # of an archive of libtorch's OutputArchive: it has tensors
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "array": {"_array_reconstructor", "array"},
    "collections": {"ChainMap", "Counter", "OrderedDict", "UserDict", "UserList", "defaultdict", "deque"},
    "contextlib": {"nullcontext"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "io": {"BytesIO", "StringIO"},
    "_io": {"BytesIO", "StringIO"},
    "ipaddress": {"IPv4Address", "IPv6Address"},
    "itertools": {"chain", "count", "cycle", "repeat"},
    "logging": {"getLogger", "Logger", "RootLogger"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "random": {"Random"},
    "re": {"_compile"},
    "time": {"struct_time"},
    "types": {"SimpleNamespace"},
    "typing": {"Any", "Dict", "List", "Optional", "Tuple", "Union"},
    "uuid": {"UUID"},
    "zoneinfo": {"ZoneInfo", "ZoneInfo._unpickle"},
}
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "__builtins__": "builtins"}
# Modules that the standard library of some version has, and that of another may not have.
OTHER_VERSIONS = frozenset(
    """
    StringIO aifc annotationlib asynchat asyncore audioop binhex cPickle cStringIO cgi cgitb chunk commands compression
    crypt distutils formatter htmlentitydefs httplib imghdr imp lib2to3 mailcap msilib nis nntplib ossaudiodev parser pipes
    popen2 sets smtpd sndhdr spwd sunau symbol telnetlib test urllib2 urlparse uu xdrlib xmlrpclib
    """.split()  # noqa: SIM905
)
# Other packages, and modules of them, that run code, read pickles, or reach files and the network.
HARMFUL = (
    "IPython", "aiohttp", "cffi", "cloudpickle", "dill", "fabric", "httplib2", "httpx", "invoke", "joblib",
    "numpy.ctypeslib", "numpy.distutils", "numpy.f2py", "numpy.testing", "pandas.eval", "pandas.io", "pandas.read_pickle",
    "paramiko", "pexpect", "pip", "pkg_resources", "plumbum", "psutil", "requests", "setuptools", "sh", "torch.hub",
    "torch.load", "torch.package", "torch.serialization.load", "torch.utils.bottleneck", "torch.utils.collect_env", "torch.utils.cpp_extension",
    "urllib3",
)  # fmt: skip
# Parts of a name that lead back into the standard library, such as six.moves.builtins.
DOORS = frozenset(
    "builtins __builtin__ ctypes importlib nt os pickle posix pty runpy shutil socket subprocess sys".split()  # noqa: SIM905
)
# Functions of torch and NumPy that only rebuild an object, by name and by how their names begin.
REBUILD = "torch._utils._rebuild_"
REBUILD_RANDOM = "numpy.random.bit_generator.__pyx_unpickle_"
REBUILDERS = frozenset(
    [
        "torch.device",
        "torch.serialization._get_layout",
        "torch.storage._load_from_bytes",
        "torch._tensor._rebuild_from_type",
        "torch._tensor._rebuild_from_type_v2",
        "numpy.dtype",
        "numpy.ma.core._mareconstruct",
        "numpy.random._pickle.__bit_generator_ctor",
        "numpy.random._pickle.__generator_ctor",
        "numpy.random._pickle.__randomstate_ctor",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.core.numeric._frombuffer",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.numeric._frombuffer",
    ]
)


def full_name(module: str, name: str) -> str:
    """The name of a global, with the modules' names of Python 3."""
    return f"{PYTHON_2.get(module, module)}.{name}"


def is_harmful(module: str, name: str) -> bool:
    """Whether no file of weights has a reason to name this global."""
    module = PYTHON_2.get(module, module)
    if module == "builtins":
        return name not in BUILTINS
    if name in PLAIN_TYPES.get(module, ()):
        return False
    package = module.partition(".")[0]
    is_private = package.startswith("_") and package != "__main__"  # as the modules that belong to Python itself
    if is_private or package in sys.stdlib_module_names or package in OTHER_VERSIONS:
        return True
    parts = name.split(".")
    # Python resolves a name with dots attribute by attribute: os.system of torch is that of the standard library.
    if DOORS & {*module.split("."), *parts}:
        return True
    if any(part in sys.stdlib_module_names for part in parts[:-1]):
        return True
    full = f"{module}.{name}"
    return any(full == root or full.startswith(f"{root}.") for root in HARMFUL)


def may_be_called(name: str) -> bool:
    """Whether a pickle may call a global that ``is_harmful`` let pass. A class may be called, whatever it is."""
    if name.startswith((REBUILD, REBUILD_RANDOM)) or name in REBUILDERS:
        return True
    is_theirs = name.startswith(("torch.", "numpy."))
    return not is_theirs or name.rpartition(".")[2].lstrip("_")[:1].isupper()
