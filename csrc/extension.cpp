// The Python module turnfast._C: importing it registers the operators of namespace `turnfast`.
// Every operator is reached through torch.ops.turnfast; the module only says what it was built from
// (see kernels/extension.py).

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

#define TURNFAST_TEXT(x) #x
#define TURNFAST_EXPANDED(x) TURNFAST_TEXT(x)

PyMODINIT_FUNC PyInit__C() {
  PyObject* made = PyModule_Create(&module);
  if (made != nullptr &&
      PyModule_AddStringConstant(made, "sources", TURNFAST_EXPANDED(TURNFAST_SOURCES)) < 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
