/* libFuzzer's entry points: one target, which GPOOLER_FUZZ_TARGET names, in a Python that runs for its modules. */

#include <Python.h>
#include <sanitizer/lsan_interface.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static void (*target)(const unsigned char *data, size_t size);

static void start(void)
{
    char name[64];
    PyConfig config;
    PyObject *module = NULL, *functions, *capsule = NULL;

    PyConfig_InitIsolatedConfig(&config);
    config.site_import = 0;
    PyConfig_SetBytesString(&config, &config.program_name, PYTHON);
    if (PyStatus_Exception(Py_InitializeFromConfig(&config)))
        return;
    PyConfig_Clear(&config);
    PyRun_SimpleString("import sys; sys.path.insert(0, '" MODULES "')");
    snprintf(name, sizeof(name), "targets.%s", getenv("GPOOLER_FUZZ_TARGET") ? getenv("GPOOLER_FUZZ_TARGET") : "");
    module = PyImport_ImportModule(name);
    if (module) {
        functions = PyObject_GetAttrString(module, "__pyx_capi__");
        capsule = functions ? PyDict_GetItemString(functions, "run") : NULL;
    }
    if (capsule)
        target = (void (*)(const unsigned char *, size_t)) PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));
    else
        PyErr_Print();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void) argc;
    (void) argv;
    __lsan_disable(); /* what Python keeps to the end is not ours */
    start();
    __lsan_enable();
    if (!target) {
        fprintf(stderr, "GPOOLER_FUZZ_TARGET names no target\n");
        exit(2);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    target(data, size);
    return 0;
}
