// The Python module turnfast._C. Importing it registers the operators of torch.ops.turnfast. Its
// attribute `sources` is the hash of the sources it was built from (see kernels/extension.py).

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

#define TURNFAST_QUOTE(x) #x
#define TURNFAST_QUOTE_VALUE(x) TURNFAST_QUOTE(x)

PyMODINIT_FUNC PyInit__C() {
  PyObject* created = PyModule_Create(&module);
  if (created != nullptr &&
      PyModule_AddStringConstant(created, "sources", TURNFAST_QUOTE_VALUE(TURNFAST_SOURCES)) < 0) {
    Py_DECREF(created);
    return nullptr;
  }
  return created;
}
