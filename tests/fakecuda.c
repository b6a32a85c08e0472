/* Stands in for the driver's libcuda.so.1 and for two questions that PyTorch asks it, on a machine without a
   GPU. Compiled and preloaded by test_fakecuda.py. */
static volatile int devices = 0;

/* From now on there are so many GPUs -> how many there were. */
int fake_devices(int count)
{
    int before = devices;
    devices = count;
    return before;
}

/* c10::cuda::device_count(): the autograd engine asks how many GPUs there are; all else shall find none. */
signed char _ZN3c104cuda12device_countEv(void) { return (signed char)devices; }

/* The driver: it starts no GPU, and no GPU has a context. */
int cuInit(unsigned flags) { return 100; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    *flags = 0;
    *active = 0;
    return 0;
}
