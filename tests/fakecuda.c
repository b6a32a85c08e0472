/* Stands in for the driver's libcuda.so.1 and for two questions that PyTorch asks it, on a machine without a GPU.
   Compiled and preloaded by test_fakecuda.py. */
static volatile int devices = 0;

void fake_devices(int count) { devices = count; }

/* c10::cuda::device_count(): the autograd engine asks how many GPUs there are; everything else shall find none. */
signed char _ZN3c104cuda12device_countEv(void) { return (signed char)devices; }

/* The driver: it starts no GPU, and no GPU has a context. */
int cuInit(unsigned flags) { return 100; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    *flags = 0;
    *active = 0;
    return 0;
}
