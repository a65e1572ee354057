//! NVIDIA's devices, as their own library tells of them. It is looked for at run time: no host needs it to build or run.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;

use optimus_common::Bytes;
use optimus_common::protocol::DeviceGroup;

/// Where the driver installs its library.
pub const LIBRARY: &str = "libnvidia-ml.so.1";
/// Most devices asked for.
const DEVICES_MAX: u32 = 64;
/// Room for a text, as the library's own documentation gives it.
const TEXT_MAX: usize = 96;
/// Device files every user of a GPU needs beside the GPU's own.
const SHARED: [&str; 3] = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"];

/// Why nothing is known of NVIDIA's devices.
#[derive(Debug, thiserror::Error)]
pub enum NvmlError {
    /// Most hosts have none.
    #[error("{library} cannot be loaded: {why}")]
    NotThere { library: String, why: String },
    #[error("the library has no function {0}")]
    NoFunction(&'static str),
    #[error("{function} answers {code}")]
    Refused { function: &'static str, code: i32 },
}

type Handle = *mut c_void;

#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// The opened library. Never closed: it may have threads of its own.
struct Library(Handle);

impl Library {
    fn open(name: &str) -> Result<Library, NvmlError> {
        let failed = |why: String| NvmlError::NotThere { library: name.to_owned(), why };
        let path = CString::new(name).map_err(|_| failed("the name holds a NUL".into()))?;
        // SAFETY: a NUL-terminated path. The library's initialisers run: it is the driver's own, or what a test gives.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: dlerror gives a NUL-terminated text of this thread, or null.
            let why = unsafe {
                let text = libc::dlerror();
                if text.is_null() { "unknown".to_owned() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
            };
            return Err(failed(why));
        }
        Ok(Library(handle))
    }

    /// A function by its name.
    ///
    /// # Safety
    /// `F` must be the type of that function.
    unsafe fn function<F: Copy>(&self, name: &'static str) -> Result<F, NvmlError> {
        const { assert!(size_of::<F>() == size_of::<Handle>()) };
        let c_name = CString::new(name).map_err(|_| NvmlError::NoFunction(name))?;
        // SAFETY: the handle is open, the name NUL-terminated.
        let found = unsafe { libc::dlsym(self.0, c_name.as_ptr()) };
        if found.is_null() {
            return Err(NvmlError::NoFunction(name));
        }
        // SAFETY: a function pointer has the size of a pointer, checked above; its type is the caller's promise.
        Ok(unsafe { std::mem::transmute_copy::<Handle, F>(&found) })
    }
}

fn checked(function: &'static str, code: c_int) -> Result<(), NvmlError> {
    if code == 0 { Ok(()) } else { Err(NvmlError::Refused { function, code }) }
}

/// Calls a function that fills in a text.
fn text(function: &'static str, ask: impl Fn(*mut c_char, c_uint) -> c_int) -> Result<String, NvmlError> {
    let mut buffer = [0u8; TEXT_MAX];
    // The last byte stays zero, whatever the library writes.
    checked(function, ask(buffer.as_mut_ptr().cast(), (TEXT_MAX - 1) as c_uint))?;
    Ok(CStr::from_bytes_until_nul(&buffer).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default())
}

/// `NVIDIA A100-SXM4-80GB` as a rule may name it: `a100-sxm4-80gb`.
fn model(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    let name = name.strip_prefix("nvidia ").unwrap_or(&name);
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect()
}

/// Asks the library for all devices. Blocking, and as slow as the driver.
pub fn devices(library: &str) -> Result<Vec<DeviceGroup>, NvmlError> {
    type Plain = unsafe extern "C" fn() -> c_int;
    type Count = unsafe extern "C" fn(*mut c_uint) -> c_int;
    type ByIndex = unsafe extern "C" fn(c_uint, *mut Handle) -> c_int;
    type Text = unsafe extern "C" fn(Handle, *mut c_char, c_uint) -> c_int;
    type Version = unsafe extern "C" fn(*mut c_char, c_uint) -> c_int;
    type Minor = unsafe extern "C" fn(Handle, *mut c_uint) -> c_int;
    type MemoryOf = unsafe extern "C" fn(Handle, *mut Memory) -> c_int;

    let library = Library::open(library)?;
    // SAFETY: the types are those of nvml.h; pointers given to the functions are to values that outlive the calls.
    unsafe {
        let init: Plain = library.function("nvmlInit_v2")?;
        let shutdown: Plain = library.function("nvmlShutdown")?;
        let count: Count = library.function("nvmlDeviceGetCount_v2")?;
        let by_index: ByIndex = library.function("nvmlDeviceGetHandleByIndex_v2")?;
        let uuid: Text = library.function("nvmlDeviceGetUUID")?;
        let name: Text = library.function("nvmlDeviceGetName")?;
        let minor: Minor = library.function("nvmlDeviceGetMinorNumber")?;
        let memory_of: MemoryOf = library.function("nvmlDeviceGetMemoryInfo")?;
        let version: Version = library.function("nvmlSystemGetDriverVersion")?;

        checked("nvmlInit_v2", init())?;
        let ask = || {
            let driver = text("nvmlSystemGetDriverVersion", |buffer, room| version(buffer, room))?;
            let mut n = 0;
            checked("nvmlDeviceGetCount_v2", count(&mut n))?;
            let mut groups: BTreeMap<(String, u64), DeviceGroup> = BTreeMap::new();
            for index in 0..n.min(DEVICES_MAX) {
                let mut device: Handle = std::ptr::null_mut();
                checked("nvmlDeviceGetHandleByIndex_v2", by_index(index, &mut device))?;
                let id = text("nvmlDeviceGetUUID", |buffer, room| uuid(device, buffer, room))?;
                let name = text("nvmlDeviceGetName", |buffer, room| name(device, buffer, room))?;
                let (mut number, mut memory) = (0, Memory::default());
                checked("nvmlDeviceGetMinorNumber", minor(device, &mut number))?;
                checked("nvmlDeviceGetMemoryInfo", memory_of(device, &mut memory))?;
                let shared = SHARED.iter().filter(|path| Path::new(path).exists()).map(|path| (*path).to_owned());
                let paths = [format!("/dev/nvidia{number}")].into_iter().chain(shared).collect();
                let group = groups.entry((model(&name), memory.total)).or_insert_with(|| DeviceGroup {
                    vendor: "nvidia".into(),
                    kind: "gpu".into(),
                    name: model(&name),
                    attributes: BTreeMap::from([
                        ("memory".to_owned(), Bytes(memory.total >> 20 << 20).to_string()),
                        ("driver".to_owned(), driver.clone()),
                    ]),
                    ..DeviceGroup::default()
                });
                group.ids.push(id.clone());
                group.paths.insert(id, paths);
            }
            Ok(groups.into_values().collect())
        };
        let found = ask();
        shutdown();
        found
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Two A100 and a T4, in the words of nvml.h.
    const FAKE: &str = r#"
        #include <string.h>
        static int up = 0;
        typedef struct { unsigned long long total, free, used; } memory;
        int nvmlInit_v2(void) { up++; return 0; }
        int nvmlShutdown(void) { up--; return 0; }
        int nvmlDeviceGetCount_v2(unsigned *n) { if (!up) return 1; *n = 3; return 0; }
        int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { if (i > 2) return 2; *d = (void *)(long)(i + 1); return 0; }
        int nvmlDeviceGetUUID(void *d, char *t, unsigned n) { strcpy(t, "GPU-0"); t[4] += (long)d - 1; return 0; }
        int nvmlDeviceGetName(void *d, char *t, unsigned n) { strcpy(t, (long)d == 3 ? "Tesla T4" : "NVIDIA A100-SXM4-80GB"); return 0; }
        int nvmlDeviceGetMinorNumber(void *d, unsigned *n) { *n = (long)d - 1; return 0; }
        int nvmlDeviceGetMemoryInfo(void *d, memory *m) { m->total = ((long)d == 3 ? 15ULL : 80ULL) << 30; return 0; }
        int nvmlSystemGetDriverVersion(char *t, unsigned n) { strcpy(t, "550.54.15"); return 0; }
    "#;

    fn build(source: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let (code, library) = (dir.path().join("fake.c"), dir.path().join("libnvidia-ml.so"));
        std::fs::write(&code, source).unwrap();
        let built = std::process::Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&code).status();
        assert!(built.expect("the tests need a C compiler, cc").success());
        let library = library.to_str().unwrap().to_owned();
        (dir, library)
    }

    #[test]
    fn devices_are_grouped_by_model_and_memory() {
        let (_dir, library) = build(FAKE);
        let groups = devices(&library).unwrap();
        assert_eq!(groups.iter().map(|g| (g.name.as_str(), g.ids.len())).collect::<Vec<_>>(), [("a100-sxm4-80gb", 2), ("tesla-t4", 1)]);
        assert_eq!((groups[0].ids[1].as_str(), groups[0].paths["GPU-1"][0].as_str()), ("GPU-1", "/dev/nvidia1"));
        assert_eq!((groups[1].attributes["memory"].as_str(), groups[1].attributes["driver"].as_str()), ("15G", "550.54.15"));
        // Asked again, it is up again.
        assert_eq!(devices(&library).unwrap(), groups);
    }

    #[test]
    fn what_is_not_there_or_not_as_it_should_be_is_named() {
        assert!(matches!(devices("/nonexistent/libnvidia-ml.so").unwrap_err(), NvmlError::NotThere { .. }));
        let (_dir, old) = build("int nvmlInit_v2(void) { return 0; }");
        assert!(matches!(devices(&old).unwrap_err(), NvmlError::NoFunction("nvmlShutdown")));
        let (_dir, broken) = build(&FAKE.replace("{ up++; return 0; }", "{ return 9; }"));
        assert!(matches!(devices(&broken).unwrap_err(), NvmlError::Refused { function: "nvmlInit_v2", code: 9 }));
    }
}
