/* libFuzzer's entry points: one target, which GPOOLER_FUZZ_TARGET names, in a Python that runs for its modules.

A target is an extension module with a C function "run", or a Python module with a function of that name. What
Python code a target passes is told to libFuzzer by a trace function, as the compiled code tells it by itself. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sanitizer/lsan_interface.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EDGES (1 << 16)
#define TRACED "/gpooler/" /* in the names of files whose Python code counts */

static void (*target)(const unsigned char *data, size_t size);
static PyObject *function;

/* libFuzzer finds these by the name of their section, and sets them to 0 before each input. */
__attribute__((section("__libfuzzer_extra_counters"), no_sanitize("address"))) static uint8_t edges[EDGES];

static int is_traced(PyCodeObject *code)
{
    const char *file = PyUnicode_AsUTF8(code->co_filename);
    return file && strstr(file, TRACED);
}

/* Counts the ways from one instruction to the next. */
static int trace(PyObject *self, PyFrameObject *frame, int what, PyObject *argument)
{
    static uint32_t before;
    PyCodeObject *code;
    uint32_t here;

    (void) self;
    (void) argument;
    if (what != PyTrace_CALL && what != PyTrace_OPCODE)
        return 0;
    code = PyFrame_GetCode(frame);
    if (what == PyTrace_OPCODE) {
        here = (uint32_t) PyObject_Hash(code->co_name) + (uint32_t) code->co_firstlineno * 7919u;
        here = (here ^ here >> 16) * 2654435761u + (uint32_t) PyFrame_GetLasti(frame) * 40503u;
        edges[((here ^ before) >> 8) % EDGES]++;
        before = here >> 1;
    } else if (is_traced(code) && PyObject_SetAttrString((PyObject *) frame, "f_trace_opcodes", Py_True)) {
        PyErr_Clear();
    }
    Py_DECREF(code);
    return 0;
}

static void start_python(void)
{
    PyPreConfig early;
    PyConfig config;

    PyPreConfig_InitIsolatedConfig(&early);
    early.utf8_mode = 1;
    early.allocator = PYMEM_ALLOCATOR_MALLOC; /* so that AddressSanitizer sees each object */
    if (PyStatus_Exception(Py_PreInitialize(&early)))
        exit(2);
    PyConfig_InitIsolatedConfig(&config);
    config.site_import = 0;
    signal(SIGPIPE, SIG_IGN); /* as Python does where it is not isolated */
    config.use_hash_seed = 1; /* the same ways have the same numbers each time */
    PyConfig_SetBytesString(&config, &config.program_name, PYTHON);
    if (PyStatus_Exception(Py_InitializeFromConfig(&config)))
        exit(2);
    PyConfig_Clear(&config);
}

static void start(const char *name)
{
    char path[128];
    PyObject *module, *functions, *capsule = NULL;

    start_python();
    PyRun_SimpleString("import sys; sys.path += ['" ROOT "', '" SITE "']; import tests.fuzz.instrumented");
    snprintf(path, sizeof(path), "tests.fuzz.targets.%s", name);
    module = PyImport_ImportModule(path);
    if (!module) {
        PyErr_Print();
        return;
    }
    functions = PyObject_GetAttrString(module, "__pyx_capi__");
    if (functions) {
        capsule = PyDict_GetItemString(functions, "run");
        if (capsule)
            target = (void (*)(const unsigned char *, size_t)) PyCapsule_GetPointer(capsule,
                                                                                     PyCapsule_GetName(capsule));
        return;
    }
    PyErr_Clear();
    function = PyObject_GetAttrString(module, "run");
    if (function)
        PyEval_SetTrace(trace, NULL);
    else
        PyErr_Print();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const char *name = getenv("GPOOLER_FUZZ_TARGET");

    (void) argc;
    (void) argv;
    __lsan_disable(); /* what Python keeps to the end is not ours */
    start(name ? name : "");
    if (target)
        __lsan_enable();
    if (!target && !function) {
        fprintf(stderr, "GPOOLER_FUZZ_TARGET names no target\n");
        exit(2);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    PyObject *result;

    if (target) {
        target(data, size);
        return 0;
    }
    result = PyObject_CallFunction(function, "y#", (const char *) data, (Py_ssize_t) size);
    if (!result) {
        PyErr_Print();
        fprintf(stderr, "fuzz: the target raised what stands above\n");
        abort();
    }
    Py_DECREF(result);
    return 0;
}
