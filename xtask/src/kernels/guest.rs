//! One virtual machine: an initial file system with the modules that it needs, this machine's files below an overlay,
//! a script of jobs, and power off. What it prints comes back with the exit code of each job.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::archive::Image;
use crate::shell;

/// What the machine, the lab and the tests need; a kernel that has one built in has no such file.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtiofs",
    "overlay",
    "veth",
    "bridge",
    "tcp_diag",
    "nf_tables",
    "nft_chain_nat",
    "sch_netem",
];
const FILE_SERVER: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];
const MEMORY_MIB: u32 = 3072;
/// How long all jobs of one machine may take.
const TIME_MAX: Duration = Duration::from_secs(45 * 60);
/// What the script prints before a job's exit code.
const EXIT: &str = "guest-exit:";

/// The first program: mounts, loads, and becomes the script in the overlay.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/modules/$module" || echo "insmod $module failed"; done < /modules/order
$b mount -t virtiofs -o ro host /lower || { echo "no file server"; $b poweroff -f; }
$b mount -t tmpfs tmpfs /rw; $b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /new || $b poweroff -f
$b mount -t tmpfs tmpfs /new/run; $b mount -t tmpfs tmpfs /new/tmp; $b mount -t devtmpfs dev /new/dev
$b mkdir -p /new/dev/pts /new/dev/shm
$b mount -t devpts devpts /new/dev/pts; $b mount -t tmpfs shm /new/dev/shm
$b mount -t proc proc /new/proc; $b mount -t sysfs sys /new/sys
$b mount -t cgroup2 cgroup2 /new/sys/fs/cgroup; $b mount -t bpf bpf /new/sys/fs/bpf
$b cp /script /new/run/script
exec $b chroot /new /bin/sh /run/script
"#;

/// A machine to be started.
pub struct Guest<'a> {
    /// Its kernel.
    pub image: &'a Image,
    /// Where its initial file system and its socket go.
    pub directory: PathBuf,
    /// QEMU's accelerator.
    pub accel: &'a str,
}

/// One command in the machine.
pub struct Job {
    script: String,
}

/// What a machine came to.
pub struct Output {
    /// All that it printed.
    text: String,
    /// Each job's exit code.
    pub exits: Vec<i32>,
}

impl Output {
    /// Line by line.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.text.lines()
    }
}

impl Job {
    /// A test program. Two at a time: what is emulated is slow, and tests have deadlines.
    pub fn test(program: &Path, package: &Path, programs: &Path, filter: Option<&str>) -> Job {
        let mut script = format!(
            "cd {0} && CARGO_MANIFEST_DIR={0} NODEMESH_PROGRAMS={1} RUST_BACKTRACE=0 {2} --test-threads 2",
            quoted(&package.display().to_string()),
            quoted(&programs.display().to_string()),
            quoted(&program.display().to_string()),
        );
        if let Some(filter) = filter {
            // Writing to a string cannot fail.
            let _ = write!(script, " {}", quoted(filter));
        }
        Job { script }
    }

    /// An agent that is to refuse this kernel.
    pub fn refusal(agent: &Path) -> Job {
        Job {
            script: format!(
                "timeout 60 {} --node test --state-dir /run/agent --controller 127.0.0.1:1",
                quoted(&agent.display().to_string())
            ),
        }
    }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn script(jobs: &[Job]) -> String {
    let mut script = String::from(
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root\n\
         ip link set lo up\n",
    );
    for job in jobs {
        // Writing to a string cannot fail.
        let _ = writeln!(script, "( {} ) 2>&1; echo \"{EXIT} $?\"", job.script);
    }
    script.push_str("sync; echo o > /proc/sysrq-trigger; sleep 60\n");
    script
}

impl Guest<'_> {
    /// Boots, runs the jobs one after the other, and powers off.
    pub fn run(&self, jobs: &[Job]) -> Result<Output> {
        let initial = self.directory.join("initrd");
        fs::write(&initial, self.initial_files(jobs)?)?;
        let socket = self.directory.join("files.sock");
        let _files = FileServer::start(&socket)?;
        let mut machine = shell::root_command("timeout")?;
        machine.arg(TIME_MAX.as_secs().to_string()).arg("qemu-system-x86_64");
        // Five-level paging, emulated, corrupts the memory of Linux 6.12 (QEMU 7.2).
        machine.args([
            "-accel",
            self.accel,
            "-cpu",
            "max,la57=off",
            "-smp",
            "2",
            "-nic",
            "none",
        ]);
        machine.args(["-nographic", "-no-reboot", "-append", "console=ttyS0 quiet panic=-1"]);
        machine.arg("-m").arg(MEMORY_MIB.to_string());
        machine.arg("-object");
        machine.arg(format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on"));
        machine.args(["-numa", "node,memdev=memory", "-chardev"]);
        machine.arg(format!("socket,id=files,path={}", socket.display()));
        machine.args(["-device", "vhost-user-fs-pci,chardev=files,tag=host"]);
        machine
            .arg("-kernel")
            .arg(&self.image.vmlinuz)
            .arg("-initrd")
            .arg(&initial);
        let mut machine = machine
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("run qemu")?;
        let output = machine.stdout.take().context("no output of qemu")?;
        let (mut text, mut exits) = (String::new(), Vec::new());
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
            println!("  {line}");
            if let Some(code) = line.trim().strip_prefix(EXIT) {
                exits.push(code.trim().parse().unwrap_or(-1));
            }
            text.push_str(&line);
            text.push('\n');
        }
        let status = machine.wait()?;
        ensure!(status.success(), "the virtual machine: {status}");
        Ok(Output { text, exits })
    }

    /// The initial file system: busybox, the modules in their order, the script.
    fn initial_files(&self, jobs: &[Job]) -> Result<Vec<u8>> {
        let mut files = Archive::default();
        for directory in ["bin", "modules", "proc", "sys", "dev", "lower", "rw", "new"] {
            files.directory(directory);
        }
        files.file("init", INIT.as_bytes());
        files.file("script", script(jobs).as_bytes());
        files.file("bin/busybox", &fs::read("/bin/busybox").context("busybox-static")?);
        let mut order = String::new();
        for path in self.modules()? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let name = name.trim_end_matches(".xz").to_owned();
            let bytes = match path.extension().is_some_and(|end| end == "xz") {
                true => {
                    let output = Command::new("xz").arg("-dc").arg(&path).output().context("run xz")?;
                    ensure!(output.status.success(), "xz -dc {}", path.display());
                    output.stdout
                }
                false => fs::read(&path)?,
            };
            files.file(&format!("modules/{name}"), &bytes);
            order.push_str(&name);
            order.push('\n');
        }
        files.file("modules/order", order.as_bytes());
        Ok(files.end())
    }

    /// The modules' files, each after those that it needs.
    fn modules(&self) -> Result<Vec<PathBuf>> {
        let release = &self.image.release;
        shell::run(
            Command::new("/sbin/depmod")
                .arg("-b")
                .arg(&self.image.root)
                .arg(release),
        )?;
        let mut all: Vec<PathBuf> = Vec::new();
        for module in MODULES {
            let output = Command::new("/sbin/modprobe")
                .arg("-d")
                .arg(&self.image.root)
                .args(["-S", release, "--show-depends", module])
                .output()
                .context("run modprobe")?;
            // A module that is not there is built in, or its test says what it lacks.
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let needed = said.lines().filter_map(|line| line.strip_prefix("insmod "));
            for path in needed.map(|path| PathBuf::from(path.trim())) {
                if !all.contains(&path) {
                    all.push(path);
                }
            }
        }
        Ok(all)
    }
}

/// Serves this machine's files to the machine; ends with it.
struct FileServer {
    process: Child,
}

impl FileServer {
    fn start(socket: &Path) -> Result<FileServer> {
        let program = FILE_SERVER.iter().find(|path| Path::new(path).exists());
        let program = program.context("no virtiofsd: it comes with QEMU or as the package virtiofsd")?;
        if socket.exists() {
            fs::remove_file(socket)?;
        }
        let mut command = shell::root_command(program)?;
        command.arg(format!("--socket-path={}", socket.display()));
        command.args(["-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always"]);
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("run virtiofsd")?;
        let server = FileServer { process };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "virtiofsd does not serve");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        // It ends by itself when the machine does; if there was none, it is ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A cpio archive of the form that kernels unpack (newc).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, 0o100_755, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let header = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(content.len()).unwrap_or(u32::MAX),
            0,
            0,
            0,
            0,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in header {
            // Writing to memory cannot fail.
            let _ = write!(self.bytes, "{field:08x}");
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_cpio_says() {
        let mut archive = Archive::default();
        archive.directory("a");
        archive.file("a/b", b"hello");
        let bytes = archive.end();
        assert!(bytes.len().is_multiple_of(4));
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000041ed"));
        assert!(text.contains("a/b\0"));
        assert!(text.contains("hello\0\0\u{0}070701"), "content is padded to four bytes");
        assert!(text.contains("TRAILER!!!"));
    }

    #[test]
    fn words_of_a_script_are_quoted() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
