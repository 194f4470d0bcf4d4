// A device guard for "cuda" that does nothing, so that torch's dispatcher and autograd's engine accept fake tensors of a
// device that is not there. All work is done at once: every event has happened, and every stream is the default one.
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

namespace {
constexpr DeviceType CUDA = DeviceType::CUDA;

struct FakeGuard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return CUDA; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return Device(CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}

  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(CUDA, 0)); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}

  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
}  // namespace

extern "C" void install_fake_cuda() {
  static FakeGuard guard;
  impl::registerDeviceGuard(CUDA, &guard);
}
