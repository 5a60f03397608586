// A CUDA device that is not there, for torch's CPU build.
//
// Tensors of device cuda:0 are real; their memory is the host's and their kernels are the CPU's. What is
// emulated is what a training loop can get wrong without a kernel being wrong:
//
//   * where a tensor lies: an operation on tensors of two devices fails, as on a GPU;
//   * when the host waits: reading a number, copying to or from pageable memory, `nonzero` and their like;
//   * the order of streams: what one stream writes, another may read only after an event or a wait says so;
//   * memory: freed memory is given to the next who asks on that stream, and its old bytes are gone;
//   * CUDA graphs: a capture computes nothing, takes its memory from a pool that later captures reuse, and a
//     replay runs the same kernels on the same addresses, whatever has become of them.
//
// Everything else (kernels and their bits, time, NCCL, the workspaces of cuBLAS, the size of memory) is not.
//
// A rule that is broken where a GPU would compute garbage in silence is a *finding*: a sentence and how often.
// Where a GPU would fail, so does this. Python reads the findings through the C functions at the end.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

namespace {

const c10::Device DEVICE(c10::DeviceType::CUDA, 0);
std::recursive_mutex device_mutex;  // autograd's threads launch too
using Locked = std::lock_guard<std::recursive_mutex>;

// -- what is found ---------------------------------------------------------------------------------------------

using Counts = std::map<std::string, int64_t>;
Counts findings;  // rules that were broken
Counts waits;     // why the host waited for the device

void find(const std::string& sentence) { findings[sentence]++; }
std::string named(int64_t stream) { return "stream " + std::to_string(stream); }

// -- streams: happens-before, by vector clocks -----------------------------------------------------------------

using Clock = std::map<int64_t, int64_t>;  // stream -> how many of its launches are done

int64_t current_stream = 0;          // 0 is the default stream
Clock launched;                      // launches on each stream so far
std::map<int64_t, Clock> known;      // what each stream has waited for
Clock known_to_host;                 // what the host has waited for: all that is launched later comes after it
std::map<int64_t, Clock> events;     // what an event stands for, as it was recorded
int64_t next_event = 1;

void merge(Clock& into, const Clock& from) {
  for (auto& [stream, tick] : from) into[stream] = std::max(into[stream], tick);
}

Clock clock_of(int64_t stream) {
  Clock clock = known[stream];
  merge(clock, known_to_host);
  clock[stream] = launched[stream];
  return clock;
}

// Whether launch `tick` of `before` is done when something launched on `now` begins.
bool ordered(int64_t now, int64_t before, int64_t tick) {
  if (now == before) return true;
  auto done = [&](const Clock& clock) {
    auto it = clock.find(before);
    return it != clock.end() && it->second >= tick;
  };
  return done(known[now]) || done(known_to_host);
}

// -- memory ----------------------------------------------------------------------------------------------------

constexpr size_t GRAIN = 512;      // bytes; CUDA's allocator rounds sizes up to it
constexpr int GARBAGE = 0xFF;      // NaN as a number, -1 as an index
constexpr int ORDINARY = 0;        // the pool of memory that no graph owns

struct Block {
  size_t size = 0;
  int pool = ORDINARY;
  int64_t stream = 0;              // that allocated it, and gets it back
  bool live = false;
  int64_t birth = 0;               // counts allocations: the same address, given out again, is another block
  int64_t graph = 0;               // that was being captured when it was allocated
  int64_t writer = -1, written = 0;                   // the last launch that wrote it
  std::string last;                                   // and its name
  std::map<int64_t, std::pair<int64_t, std::string>> readers;  // the last launch of each stream that read it since
  std::set<int64_t> recorded;      // streams that Tensor.record_stream named: it is kept for them
};

std::map<char*, Block> blocks;     // by address, the free ones too
std::map<std::tuple<int, int64_t, size_t>, std::vector<char*>> unused;  // (pool, stream, size)
int64_t births = 0;
int64_t allocated = 0, reserved = 0, peak = 0;  // bytes

Block* block_at(const void* address) {
  auto it = blocks.upper_bound((char*)address);
  if (it == blocks.begin()) return nullptr;
  --it;
  return (char*)address < it->first + it->second.size ? &it->second : nullptr;
}

// -- graphs ----------------------------------------------------------------------------------------------------

struct Touch { char* address; int64_t birth; bool write; };
struct Node { std::string name; std::function<void()> run; std::vector<Touch> touched; };
struct Graph {
  int pool = ORDINARY;
  std::vector<Node> nodes;
  std::map<char*, std::vector<char>> before;  // what memory held that the capture's kernels have overwritten
  std::string error;                          // the first thing that may not be captured
  std::vector<char> random;                   // state of the random generator at its beginning
};

std::map<int64_t, Graph> graphs;
std::map<int, int> users;          // of a pool: graphs that are not destroyed
int64_t capturing = 0;             // the graph being captured, 0: none
int64_t capture_stream = -1;
int64_t next_graph = 1;
int next_pool = 1;
bool replaying = false;

bool in_capture() { return capturing && current_stream == capture_stream; }

void forbid_in_capture(const std::string& what) {
  if (!in_capture()) return;
  find("capture: " + what);
  auto& error = graphs[capturing].error;
  if (error.empty()) error = what;
}

// -- the allocator ---------------------------------------------------------------------------------------------

void free_block(void* address) {
  if (!address) return;
  Locked lock(device_mutex);
  auto it = blocks.find((char*)address);
  if (it == blocks.end()) return;
  Block& block = it->second;
  block.live = false;
  allocated -= block.size;
  // its own stream may write it from now on: what others do with it must be done
  const std::string whose = "memory of " + named(block.stream) + " is freed while ";
  if (block.writer >= 0 && !block.recorded.count(block.writer) && !ordered(block.stream, block.writer, block.written))
    find("order: " + whose + named(block.writer) + " writes it (" + block.last + ")");
  for (auto& [stream, reader] : block.readers)
    if (!block.recorded.count(stream) && !ordered(block.stream, stream, reader.first))
      find("order: " + whose + named(stream) + " reads it (" + reader.second + ", after " + block.last + ")");
  memset(address, GARBAGE, block.size);
  unused[{block.pool, block.stream, block.size}].push_back((char*)address);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Locked lock(device_mutex);
    if (bytes == 0) return {nullptr, nullptr, &free_block, DEVICE};
    const size_t size = (bytes + GRAIN - 1) / GRAIN * GRAIN;
    const int pool = in_capture() ? graphs[capturing].pool : ORDINARY;
    auto& free = unused[{pool, current_stream, size}];
    char* address;
    if (free.empty()) {
      address = (char*)std::aligned_alloc(GRAIN, size);
      reserved += size;
    } else {
      address = free.back();
      free.pop_back();
    }
    memset(address, GARBAGE, size);
    Block block;
    block.size = size;
    block.pool = pool;
    block.stream = current_stream;
    block.live = true;
    block.birth = ++births;
    block.graph = in_capture() ? capturing : 0;
    blocks[address] = block;
    allocated += size;
    peak = std::max(peak, allocated);
    return {address, address, &free_block, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};
DeviceAllocator allocator;

void return_to_system(int pool) {  // what a pool holds and nobody uses
  for (auto it = unused.begin(); it != unused.end();) {
    if (std::get<0>(it->first) != pool) { ++it; continue; }
    for (char* address : it->second) {
      reserved -= blocks[address].size;
      blocks.erase(address);
      std::free(address);
    }
    it = unused.erase(it);
  }
}

// Pinned memory: a copy from it may still be to come when the call returns, so it must not change until then.
struct Transfer { std::vector<char> bytes; int64_t stream, tick; };
std::map<char*, size_t> pinned;
std::multimap<char*, Transfer> transfers;

bool is_pinned(const void* address) {
  auto it = pinned.upper_bound((char*)address);
  if (it == pinned.begin()) return false;
  --it;
  return (char*)address < it->first + it->second;
}

void check_transfers(bool all, char* from = nullptr, size_t size = 0) {
  for (auto it = transfers.begin(); it != transfers.end();) {
    auto& [address, transfer] = *it;
    auto done = known_to_host.find(transfer.stream);
    const bool ended = done != known_to_host.end() && done->second >= transfer.tick;
    const bool freed = from && address >= from && address < from + size;
    if (!all && !ended && !freed) { ++it; continue; }
    if (memcmp(address, transfer.bytes.data(), transfer.bytes.size()))
      find("copy: pinned memory was written before a copy from it was done");
    it = transfers.erase(it);
  }
}

void unpin(void* address) {  // the allocator itself waits for the copies
  Locked lock(device_mutex);
  check_transfers(false, (char*)address, pinned[(char*)address]);
  pinned.erase((char*)address);
  std::free(address);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Locked lock(device_mutex);
    forbid_in_capture("pinned memory is allocated");
    const size_t size = (bytes + GRAIN) / GRAIN * GRAIN;
    char* address = (char*)std::aligned_alloc(GRAIN, size);
    pinned[address] = size;
    return {address, address, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

// -- waiting ---------------------------------------------------------------------------------------------------

bool waiting_is_an_error = false;  // torch.cuda.set_sync_debug_mode("error")

void host_knows(const Clock& clock) {
  merge(known_to_host, clock);
  check_transfers(false);
}

void synchronize_device() {
  for (auto& [stream, tick] : launched) host_knows(clock_of(stream));
}

void host_waits(const std::string& why) {
  Locked lock(device_mutex);
  if (replaying) return;
  waits[why]++;
  if (in_capture()) {
    forbid_in_capture("the host waits: " + why);
    TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing (", why, ")");
  }
  TORCH_CHECK(!waiting_is_an_error, "called a synchronizing CUDA operation (", why, ")");
  host_knows(clock_of(current_stream));
}

// -- what torch asks of a device -------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, DEVICE, id); }
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const int64_t old = current_stream;
    current_stream = next.id();
    return stream(old);
  }
  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    Locked lock(device_mutex);
    if (!*event) *event = (void*)(next_event++);
    events[(int64_t)*event] = clock_of(on.id());
  }
  void block(void* event, const c10::Stream& on) const override {
    Locked lock(device_mutex);
    if (event) merge(known[on.id()], events[(int64_t)event]);
  }
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& on) const override { host_knows(clock_of(on.id())); }
  void synchronizeEvent(void* event) const override { if (event) host_knows(events[(int64_t)event]); }
  void synchronizeDevice(const c10::DeviceIndex) const override { synchronize_device(); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& on) const override {
    Locked lock(device_mutex);
    if (Block* block = block_at(data.get())) block->recorded.insert(on.id());
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// The device's random numbers come from a generator of its own, so that a checkpoint that forgets it shows.
at::Generator device_generator = at::detail::createCPUGenerator(0);

struct Hooks : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  void deviceSynchronize(c10::DeviceIndex) const override { synchronize_device(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return device_generator; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

}  // namespace

namespace at {
using EmulatedHooks = Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, EmulatedHooks)
}  // namespace at

namespace {

struct AtLoading {
  AtLoading() { c10::SetAllocator(c10::DeviceType::CUDA, &allocator, 100); }
} at_loading;

// -- a launch --------------------------------------------------------------------------------------------------

// The operation `name` reads or writes memory, on the current stream.
void touch(const void* address, bool write, const std::string& name) {
  Block* block = block_at(address);
  if (!block) return find("memory: " + name + " uses memory of no allocation");
  if (!block->live) find("memory: " + name + " uses memory that was freed");
  if (in_capture()) return;  // nothing is launched yet
  const std::string here = name + " on " + named(current_stream);
  if (block->writer >= 0 && !ordered(current_stream, block->writer, block->written))
    find("order: " + here + (write ? " writes" : " reads") + " what " + named(block->writer) + " writes (" + block->last + ")");
  if (!write) {
    block->readers[current_stream] = {launched[current_stream], name};
    return;
  }
  for (auto& [stream, reader] : block->readers)
    if (!ordered(current_stream, stream, reader.first))
      find("order: " + here + " writes what " + named(stream) + " reads (" + reader.second + ")");
  block->writer = current_stream;
  block->written = launched[current_stream];
  block->last = name;
  block->readers.clear();
}

// A capture computes nothing. Its kernels run here all the same, for the shapes of what they return: keep what
// they overwrite, to put it back.
void keep(const void* address) {
  if (!in_capture()) return;
  Graph& graph = graphs[capturing];
  Block* block = block_at(address);
  if (!block || block->graph == capturing) return;
  char* start = std::prev(blocks.upper_bound((char*)address))->first;
  if (!graph.before.count(start)) graph.before[start] = std::vector<char>(start, start + block->size);
}

struct Launch {  // what one operation touches
  std::string name;
  std::vector<std::pair<char*, bool>> touched;  // address, whether it is written

  void begin() {
    launched[current_stream]++;
    for (auto& [address, write] : touched) {
      touch(address, write, name);
      if (write) keep(address);
    }
  }
  void waited_for() { host_knows(clock_of(current_stream)); }
  void record(std::function<void()> run) {
    if (!in_capture()) return;
    Node node{name, std::move(run), {}};
    for (auto& [address, write] : touched) {
      Block* block = block_at(address);
      node.touched.push_back({address, block ? block->birth : 0, write});
    }
    graphs[capturing].nodes.push_back(std::move(node));
  }
};

// CPU tensors over the memory of device tensors, for one operation.
struct Aliases {
  std::unordered_map<c10::StorageImpl*, c10::Storage> host_of, device_of;
  std::unordered_map<c10::TensorImpl*, Tensor> originals;

  Tensor of(const Tensor& tensor) {
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto it = host_of.find(storage);
    if (it == host_of.end()) {
      c10::DataPtr data(storage->mutable_data(), c10::Device(c10::DeviceType::CPU));
      c10::Storage host(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data),
                        c10::GetAllocator(c10::DeviceType::CPU), true);
      it = host_of.emplace(storage, host).first;
      device_of.emplace(host.unsafeGetStorageImpl(), tensor.storage());
    }
    auto alias = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(it->second), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    auto* impl = alias.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    alias._set_conj(tensor.is_conj());
    alias._set_neg(tensor.is_neg());
    originals.emplace(impl, tensor);
    return alias;
  }
};

Tensor on_device(c10::Storage storage, const Tensor& like) {
  TORCH_CHECK(!like._is_zerotensor(), "a zero tensor has no memory");
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  made._set_conj(like.is_conj());
  made._set_neg(like.is_neg());
  return made;
}

void each_tensor(const IValue& value, const std::function<void(const Tensor&)>& see) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) see(value.toTensor());
  } else if (value.isList()) {
    for (const IValue& item : value.toListRef()) each_tensor(item, see);
  }
}

// The value with each tensor replaced, and the CPU in the place of the device.
IValue mapped(const IValue& value, const std::function<Tensor(const Tensor&)>& replace) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(replace(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(t.defined() ? replace(t) : t);
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const IValue& item : value.toListRef()) {
      const bool there = item.isTensor() && item.toTensor().defined();
      list.push_back(there ? std::optional<Tensor>(replace(item.toTensor())) : std::nullopt);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return IValue(c10::Device(c10::DeviceType::CPU));
  return value;
}

// Operations whose result has a shape that only the device knows, or that work on the host in between.
const std::set<std::string> WAITING = {
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
    "equal", "bincount", "histc", "_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_eigvals", "linalg_lstsq"};
// Operations whose CUDA kernels take a number of the host: a 0-dim CPU tensor beside those of the device.
const std::set<std::string> TAKING_NUMBERS = {
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "pow", "eq", "ne", "lt",
    "le", "gt", "ge", "maximum", "minimum", "fmax", "fmin", "where", "atan2", "copysign", "logical_and", "logical_or",
    "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "fill", "masked_fill", "clamp", "clamp_min", "clamp_max",
    "hypot", "nextafter", "__and__", "__or__", "__xor__", "bitwise_left_shift", "bitwise_right_shift", "xlogy", "ldexp",
    "logaddexp", "special_xlogy", "lerp", "addcmul", "addcdiv"};

std::string base_name(std::string name) {  // aten::add_ -> add
  const auto at = name.find("::");
  if (at != std::string::npos) name = name.substr(at + 2);
  if (name.size() > 1 && name.back() == '_' && name[name.size() - 2] != '_') name.pop_back();
  return name;
}

// What an operation on tensors of two devices means on a GPU: an error, a wait, or nothing.
void check_devices(const c10::FunctionSchema& schema, const std::vector<IValue>& given, const std::string& full) {
  const std::string name = base_name(schema.name());
  bool device = false;
  for (auto& value : given) each_tensor(value, [&](const Tensor& t) { device |= t.is_cuda(); });
  if (!device) return;
  for (size_t i = 0; i < given.size(); i++) {
    each_tensor(given[i], [&](const Tensor& t) {
      if (t.is_cuda()) return;
      if (name == "index" && i == 1) return;  // torch copies it itself, and a mask it makes an index of
      if (name == "_index_put_impl" && (i == 1 || t.dim() == 0)) return host_waits(full + ": an index or number of the host");
      const bool number = t.dim() == 0 && (TAKING_NUMBERS.count(name) || t.unsafeGetTensorImpl()->is_wrapped_number());
      TORCH_CHECK(number, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
                  full, ", argument ", schema.arguments()[i].name(), ")");
    });
  }
  if (WAITING.count(name)) host_waits(full);
}

// A graph knows the device's own generator, and draws on from it; any other would repeat its numbers.
void check_generator(const c10::OperatorHandle& op, const std::vector<IValue>& given) {
  if (!in_capture() || !op.hasTag(at::Tag::nondeterministic_seeded)) return;
  for (auto& value : given) {
    if (!value.isGenerator()) continue;
    forbid_in_capture("random numbers of a generator that is not registered");
    TORCH_CHECK(false, "Attempt to increase offset for a CUDA generator not in capture mode.");
  }
}

// Within it, random numbers come from the device's generator.
struct DeviceRandomness {
  const bool draws;
  at::Generator host = at::detail::getDefaultCPUGenerator();  // a handle, not a copy
  Tensor state;
  explicit DeviceRandomness(const c10::OperatorHandle& op) : draws(op.hasTag(at::Tag::nondeterministic_seeded)) {
    if (!draws) return;
    state = host.get_state();
    host.set_state(device_generator.get_state());
  }
  ~DeviceRandomness() {
    if (!draws) return;
    device_generator.set_state(host.get_state());
    host.set_state(state);
  }
};

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  DeviceRandomness randomness(op);
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

// An output of a kernel, copied into memory of the device; a replay copies it again.
struct Output { size_t place, element; char* to; size_t bytes; };

// An argument that the kernel may resize (`out=`), as it was before.
struct Before {
  Tensor alias;
  std::vector<int64_t> sizes, strides;
  int64_t offset;
  void* data;
  explicit Before(const Tensor& t)
      : alias(t), sizes(t.sizes().vec()), strides(t.strides().vec()), offset(t.storage_offset()), data(t.storage().mutable_data()) {}
  bool moved() const { return alias.storage().mutable_data() != data; }
  bool changed() const {
    return moved() || alias.sizes() != at::IntArrayRef(sizes) || alias.strides() != at::IntArrayRef(strides) || alias.storage_offset() != offset;
  }
};

// Every operation that has no kernel of its own below: the CPU's, on the same memory.
void launch(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  Locked lock(device_mutex);
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  std::vector<IValue> given(stack->end() - count, stack->end());
  torch::jit::drop(*stack, count);
  Launch here{schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name()), {}};
  check_devices(schema, given, here.name);
  check_generator(op, given);

  // the arguments, as the CPU sees them
  Aliases aliases;
  Stack cpu;
  std::vector<Before> written;
  for (size_t i = 0; i < count; i++) {
    const auto* info = schema.arguments()[i].alias_info();
    const bool write = info && info->isWrite();
    cpu.push_back(mapped(given[i], [&](const Tensor& t) -> Tensor {
      if (!t.is_cuda()) {  // a number of the host, which a graph would hold as it is now
        if (!in_capture()) return t;
        Tensor now = t.clone();
        now.unsafeGetTensorImpl()->set_wrapped_number(t.unsafeGetTensorImpl()->is_wrapped_number());
        return now;
      }
      char* address = (char*)t.storage().data();
      if (address && t.numel()) here.touched.emplace_back(address, write);
      Tensor alias = aliases.of(t);
      if (write) written.emplace_back(alias);
      return alias;
    }));
  }
  bool view = false;  // it looks at no memory
  for (auto& r : schema.returns()) view |= r.alias_info() && !r.alias_info()->isWrite();
  if (view) here.touched.clear();
  here.begin();
  const Stack recorded = in_capture() ? cpu : Stack();
  run_on_cpu(op, &cpu);

  // arguments that were resized: their new memory is the device's
  std::vector<std::pair<Tensor, char*>> resized;
  for (auto& before : written) {
    if (!before.changed()) continue;
    const Tensor& now = before.alias;
    Tensor original = aliases.originals.at(now.unsafeGetTensorImpl());
    if (before.moved()) {
      const size_t bytes = now.storage().nbytes();
      auto data = allocator.allocate(bytes);
      memcpy(data.get(), now.storage().data(), bytes);
      touch(data.get(), true, here.name);
      here.touched.emplace_back((char*)data.get(), true);
      resized.emplace_back(now, (char*)data.get());
      auto* storage = original.storage().unsafeGetStorageImpl();
      storage->set_data_ptr_noswap(std::move(data));
      storage->set_nbytes(bytes);
    }
    original.unsafeGetTensorImpl()->set_sizes_and_strides(now.sizes(), now.strides(), now.storage_offset());
  }

  // what it returns: an argument, a view of one, or new memory
  std::vector<Output> outputs;
  std::unordered_map<c10::StorageImpl*, c10::Storage> made;
  for (size_t place = 0; place < cpu.size(); place++) {
    size_t element = 0;
    torch::jit::push(*stack, mapped(cpu[place], [&](const Tensor& t) -> Tensor {
      const size_t at = element++;
      auto argument = aliases.originals.find(t.unsafeGetTensorImpl());
      if (argument != aliases.originals.end()) return argument->second;
      auto* storage = t.storage().unsafeGetStorageImpl();
      auto viewed = aliases.device_of.find(storage);
      if (viewed != aliases.device_of.end()) return on_device(viewed->second, t);
      auto it = made.find(storage);
      if (it == made.end()) {
        const size_t bytes = storage->nbytes();
        c10::Storage fresh(c10::Storage::use_byte_size_t(), bytes, allocator.allocate(bytes), &allocator, true);
        if (bytes && storage->data()) {
          char* to = (char*)fresh.mutable_data();
          memcpy(to, storage->data(), bytes);
          touch(to, true, here.name);
          here.touched.emplace_back(to, true);
          outputs.push_back({place, at, to, bytes});
        }
        it = made.emplace(storage, fresh).first;
      }
      return on_device(it->second, t);
    }));
  }
  here.record([op, recorded, outputs, resized]() {
    Stack again = recorded;
    run_on_cpu(op, &again);
    for (auto& output : outputs) {
      const IValue& value = again[output.place];
      Tensor t = value.isTensor() ? value.toTensor() : value.toTensorVector()[output.element];
      TORCH_CHECK(t.storage().nbytes() == output.bytes, "a replay returns another shape");
      memcpy(output.to, t.storage().data(), output.bytes);
    }
    for (auto& [now, to] : resized) memcpy(to, now.storage().data(), now.storage().nbytes());
  });
}

// -- operations that make or move memory -----------------------------------------------------------------------

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Where = std::optional<at::Device>;
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor empty(at::IntArrayRef size, Dtype dtype, Layout, Where, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, Layout, Where, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  Locked lock(device_mutex);
  const size_t bytes = at::detail::computeStorageNbytesContiguous(size, self.element_size(), self.storage_offset());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    auto data = allocator.allocate(bytes);
    if (storage->nbytes()) memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  Locked lock(device_mutex);
  if (!self.numel()) return self;
  const bool up = self.is_cuda() && !source.is_cuda(), down = source.is_cuda() && !self.is_cuda();
  Launch here{up ? "copy from the host" : down ? "copy to the host" : "copy", {}};
  const void* of_host = up ? source.storage().data() : down ? self.storage().data() : nullptr;
  const bool pageable = of_host && !is_pinned(of_host);
  if (up && in_capture()) forbid_in_capture(pageable ? "a copy from pageable memory" : "a copy from the host");
  const bool waits = (up || down) && (!non_blocking || (down && pageable));
  if (waits) host_waits(here.name);
  else if (up && pageable) find("copy: from pageable memory, which is not asynchronous");
  else if (down) find("copy: to pinned memory, and nothing says when it is there");

  Aliases aliases;
  auto alias = [&](const Tensor& t, bool write) {
    if (!t.is_cuda()) return t;
    here.touched.emplace_back((char*)t.storage().data(), write);
    return aliases.of(t);
  };
  Tensor to = alias(self, true), from = alias(source, false);
  here.begin();
  if (waits) here.waited_for();
  if (up && !pageable) {
    char* data = (char*)source.storage().data();
    Transfer transfer{std::vector<char>(data, data + source.storage().nbytes()), current_stream, launched[current_stream]};
    transfers.emplace(data, std::move(transfer));
  }
  auto run = [to, from]() mutable {
    at::AutoDispatchBelowADInplaceOrView below;
    to.copy_(from);
  };
  run();
  here.record(run);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor written = to;
  return copy_(written, self, non_blocking);
}

at::Scalar read_number(const Tensor& self) {
  Locked lock(device_mutex);
  host_waits("a number is read");
  Launch here{"aten::_local_scalar_dense", {{(char*)self.storage().data(), false}}};
  here.begin();
  here.waited_for();
  Aliases aliases;
  at::AutoDispatchBelowADInplaceOrView below;
  return aliases.of(self).item();
}

struct NoMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t) override { return {nullptr, nullptr, &c10::detail::deleteNothing, DEVICE}; }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::detail::deleteNothing; }
  void copy_data(void*, const void*, std::size_t) const override {}
};
NoMemory no_memory;

Tensor zero_without_memory(at::IntArrayRef size, Dtype dtype, Layout, Where, std::optional<bool>) {
  return at::detail::empty_generic(size, &no_memory, KEYS | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor),
                                   c10::dtype_or_default(dtype), std::nullopt);
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  }
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  const int64_t n = storage.nbytes() / self.element_size();
  return set_storage(self, storage, 0, {n}, {});
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&launch>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize_);
  library.impl("copy_", &copy_);
  library.impl("_copy_from", &copy_from);
  library.impl("_local_scalar_dense", &read_number);
  library.impl("_efficientzerotensor", &zero_without_memory);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole_storage);
}

// -- capture and replay ----------------------------------------------------------------------------------------

std::vector<char> random_state() {
  Tensor state = device_generator.get_state();
  const char* bytes = (const char*)state.data_ptr();
  return {bytes, bytes + state.nbytes()};
}

void set_random_state(const char* bytes, size_t size) {
  Tensor state = at::empty({(int64_t)size}, at::kByte);
  memcpy(state.data_ptr(), bytes, size);
  device_generator.set_state(state);
}

// What reading `touched` in a replay of `graph` would find, where that is not what the capture saw.
std::string stale(int64_t id, const Graph& graph, const Touch& touched, const std::set<char*>& fresh) {
  const Block* block = block_at(touched.address);
  if (!block || (block->pool != graph.pool && !block->live)) return "memory that was freed after its capture";
  if (block->pool != graph.pool && block->birth != touched.birth) return "memory that has been another tensor's since its capture";
  if (block->pool != graph.pool || touched.write || fresh.count(touched.address)) return "";
  if (block->live && block->graph == id && block->birth == touched.birth) return "";
  return "memory that another graph of its pool may have overwritten";
}

void replay(int64_t id) {
  Graph& graph = graphs.at(id);
  launched[current_stream]++;
  // what the graph leaves in its pool between two replays is anybody's
  for (auto& node : graph.nodes)
    for (auto& touched : node.touched) {
      Block* block = block_at(touched.address);
      if (block && block->pool == graph.pool && !block->live)
        memset(std::prev(blocks.upper_bound(touched.address))->first, GARBAGE, block->size);
    }
  std::set<char*> fresh;  // written in this replay
  for (auto& node : graph.nodes) {
    for (auto& touched : node.touched) {
      const std::string what = stale(id, graph, touched, fresh);
      if (!what.empty()) find("graph: " + node.name + (touched.write ? " writes " : " reads ") + what);
      Block* block = block_at(touched.address);
      if (block && block->live) touch(touched.address, touched.write, node.name + ", replayed,");
    }
    for (auto& touched : node.touched)
      if (touched.write) fresh.insert(touched.address);
    node.run();
  }
}

std::string answer;
const char* told(const Counts& counts) {
  answer.clear();
  for (auto& [sentence, times] : counts) answer += std::to_string(times) + "\t" + sentence + "\n";
  return answer.c_str();
}

}  // namespace

// -- for Python, by ctypes: tests/support/emulated/device.py ---------------------------------------------------

extern "C" {

// streams and events
int64_t stream_current() { return current_stream; }
void stream_set(int64_t stream) { current_stream = stream; }
void stream_wait_stream(int64_t stream, int64_t other) { Locked lock(device_mutex); merge(known[stream], clock_of(other)); }
void stream_synchronize(int64_t stream) { Locked lock(device_mutex); host_knows(clock_of(stream)); }
int64_t event_record(int64_t stream) { Locked lock(device_mutex); events[next_event] = clock_of(stream); return next_event++; }
void event_wait(int64_t stream, int64_t event) { Locked lock(device_mutex); merge(known[stream], events[event]); }
void event_synchronize(int64_t event) { Locked lock(device_mutex); host_knows(events[event]); }
void device_synchronize() { Locked lock(device_mutex); synchronize_device(); }
void waiting_fails(int yes) { waiting_is_an_error = yes; }

// memory, in bytes
int64_t memory_allocated() { return allocated; }
int64_t memory_reserved() { return reserved; }
int64_t memory_peak() { return peak; }
void memory_reset_peak() { peak = allocated; }
void memory_record(const void* address, int64_t stream) {
  Locked lock(device_mutex);
  if (Block* block = block_at(address)) block->recorded.insert(stream);
}
void memory_empty_cache() { Locked lock(device_mutex); return_to_system(ORDINARY); }

// random numbers
int64_t random_size() { return device_generator.get_state().nbytes(); }
void random_get(char* to) { auto state = random_state(); memcpy(to, state.data(), state.size()); }
void random_set(const char* from) { set_random_state(from, random_size()); }
void random_seed(uint64_t seed) { device_generator.set_current_seed(seed); }

// graphs; `pool`: of another graph, or 0 for one of its own
int64_t graph_begin(int pool) {
  Locked lock(device_mutex);
  capturing = next_graph++;
  capture_stream = current_stream;
  Graph& graph = graphs[capturing];
  graph.pool = pool ? pool : next_pool++;
  users[graph.pool]++;
  graph.random = random_state();
  return capturing;
}
const char* graph_end() {  // -> why it failed, or nothing
  Locked lock(device_mutex);
  const int64_t id = capturing;
  Graph& graph = graphs[id];
  capturing = 0;
  for (auto& [address, bytes] : graph.before) memcpy(address, bytes.data(), bytes.size());
  graph.before.clear();
  set_random_state(graph.random.data(), graph.random.size());
  for (auto& [address, block] : blocks)
    if (block.live && block.graph == id) memset(address, GARBAGE, block.size);
  answer = graph.error;
  return answer.c_str();
}
int graph_capturing() { return in_capture(); }
int graph_pool(int64_t id) { return graphs.at(id).pool; }
const char* graph_replay(int64_t id) {  // -> why it failed, or nothing
  Locked lock(device_mutex);
  answer.clear();
  replaying = true;
  try {
    replay(id);
  } catch (const std::exception& error) {
    answer = error.what();
  }
  replaying = false;
  return answer.c_str();
}
void graph_destroy(int64_t id) {
  Locked lock(device_mutex);
  const int pool = graphs.at(id).pool;
  graphs.erase(id);
  if (--users[pool] == 0) return_to_system(pool);
}

// what has happened since the last `forget`
const char* told_findings() { Locked lock(device_mutex); check_transfers(true); return told(findings); }
const char* told_waits() { return told(waits); }
void forget() { Locked lock(device_mutex); check_transfers(true); findings.clear(); waits.clear(); }
}
