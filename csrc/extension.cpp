// The Python module turnfast._C: importing it registers the operators of namespace `turnfast`.
// Every operator is reached through torch.ops.turnfast, so the module itself is empty.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                             "_C",
                             "Registers turnfast's C++ operators.",
                             -1,
                             nullptr,
                             nullptr,
                             nullptr,
                             nullptr,
                             nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
