//! Starting programs in a place of the lab: a cgroup and a network namespace, with the pod's own view of `/etc`.
//!
//! A small shell joins the cgroup before it becomes the program, so that not even the program's first `connect` can
//! happen outside of it. `ip netns exec` gives pods their own mount namespace with `/etc/netns/<name>/*` on `/etc`.

use std::{
    ffi::OsStr,
    fmt,
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::wait;

/// The search path of programs in pods: the system's own, not the developer's.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long a command of a test may run unless told otherwise.
pub const EXEC_LIMIT: Duration = Duration::from_secs(120);
/// The exit code of `timeout(1)` when the time was over.
const EXIT_TIMEOUT: i32 = 124;

/// Joins the cgroup `$1`, then becomes the rest of the arguments.
const JOIN: &str = "echo 0 > \"$1\" || exit 125; shift; exec \"$@\"";
/// Joins the cgroup `$1`, then runs the rest again and again as the restart policy `$2` says.
const SUPERVISE: &str = r#"echo 0 > "$1" || exit 125
policy=$2; shift 2
while :; do
  "$@"; code=$?
  echo "[lab] ended with exit code $code" >&2
  case $policy in Never) exit $code;; OnFailure) [ $code = 0 ] && exit 0;; esac
  sleep 1
done"#;

/// Where a program runs.
#[derive(Clone, Debug)]
pub struct Site {
    /// The network namespace's name.
    pub netns: String,
    /// The cgroup's directory.
    pub cgroup: PathBuf,
    /// Whether it has a mount namespace of its own with its own `/etc/hosts` (pods).
    pub own_mounts: bool,
    /// The working directory.
    pub directory: PathBuf,
    /// The whole environment; `None`: that of this process (agents, controller).
    pub env: Option<Vec<(String, String)>>,
}

impl Site {
    fn command<S: AsRef<OsStr>>(&self, script: &str, more: &[&str], argv: &[S]) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", script, "sh"])
            .arg(self.cgroup.join("cgroup.procs"))
            .args(more);
        if self.own_mounts {
            command.args(["ip", "netns", "exec", &self.netns]);
        } else {
            let file = crate::netns::path(&self.netns);
            command
                .arg("nsenter")
                .arg(format!("--net={}", file.display()))
                .arg("--");
        }
        command.args(argv).current_dir(&self.directory);
        if let Some(env) = &self.env {
            command.env_clear().envs(env.iter().map(|(key, value)| (key, value)));
        }
        command
    }

    /// A command at this site. Its process id is the program's own.
    pub fn run<S: AsRef<OsStr>>(&self, argv: &[S]) -> Command {
        self.command(JOIN, &[], argv)
    }

    /// A command under supervision, detached from this terminal, that writes its output to a file.
    pub fn supervise<S: AsRef<OsStr>>(&self, restart: &str, argv: &[S], log: &Path) -> Result<Child> {
        detach(self.command(SUPERVISE, &[restart], argv), log)
    }

    /// Runs a command to its end, at most for `limit`, and gives what it wrote.
    pub fn exec<S: AsRef<OsStr>>(&self, argv: &[S], limit: Duration) -> Result<Output> {
        let seconds = format!("{:.3}", limit.as_secs_f64());
        let mut bounded: Vec<&OsStr> = ["timeout", "--foreground", "-k", "1", &seconds]
            .map(OsStr::new)
            .to_vec();
        bounded.extend(argv.iter().map(AsRef::as_ref));
        let output = self
            .run(&bounded)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run {}", words(argv)))?;
        let ended_by_limit = output.status.code() == Some(EXIT_TIMEOUT);
        ensure!(
            !ended_by_limit,
            "{} took longer than {limit:?}\n{}",
            words(argv),
            Output::from(output)
        );
        Ok(output.into())
    }
}

/// Starts a command that outlives this process and writes to a log file.
pub fn detach(mut command: Command, log: &Path) -> Result<Child> {
    let file = OpenOptions::new().create(true).append(true).open(log);
    let file = file.with_context(|| format!("open {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .process_group(0);
    command.spawn().with_context(|| format!("run {command:?}"))
}

/// The standard error of a program, of which each line waits until the one before it was read: a program that has one
/// thing to say is held where it says it.
#[derive(Debug)]
pub struct Steps {
    lines: File,
    program: Option<std::os::fd::OwnedFd>,
}

impl Steps {
    /// A pipe of packets with room for one.
    pub fn new() -> Result<Steps> {
        let flags = rustix::pipe::PipeFlags::DIRECT | rustix::pipe::PipeFlags::CLOEXEC;
        let (read, write) = rustix::pipe::pipe_with(flags)?;
        rustix::pipe::fcntl_setpipe_size(&write, 4096)?;
        Ok(Steps {
            lines: read.into(),
            program: Some(write),
        })
    }

    /// Starts the command with its standard error here and its output nowhere.
    pub fn start(&mut self, mut command: Command) -> Result<Child> {
        let program = self.program.take().context("it was started already")?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(program)
            .process_group(0);
        // The command holds the pipe's other end; dropped with it, the end of the program is the end of the lines.
        command.spawn().with_context(|| format!("run {command:?}"))
    }

    /// The next line; `None` when the program has ended.
    pub fn line(&mut self) -> Result<Option<String>> {
        let mut packet = [0; 4096];
        let count = self.lines.read(&mut packet)?;
        let line = packet.get(..count).filter(|line| !line.is_empty());
        Ok(line.map(|line| String::from_utf8_lossy(line).trim_end().to_owned()))
    }
}

/// Runs a command to its end with a text on its standard input.
pub fn with_input(mut command: Command, input: &str) -> Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {command:?}"))?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    // A command that ends without reading its input says why by its exit code.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    Ok(child.wait_with_output()?.into())
}

/// The words of a command, for people.
pub fn words<S: AsRef<OsStr>>(argv: &[S]) -> String {
    let words: Vec<_> = argv.iter().map(|word| word.as_ref().to_string_lossy()).collect();
    words.join(" ")
}

/// What a command wrote and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl From<std::process::Output> for Output {
    fn from(output: std::process::Output) -> Output {
        Output {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Output {
    /// The exit code; that of a shell for a program that a signal ended.
    pub fn code(&self) -> i32 {
        exit_code(self.status)
    }

    /// The standard output of a command that succeeded, else an error with all that it said.
    pub fn ok(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!("{self}")
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}{}", self.status, self.stdout, self.stderr)
    }
}

/// The exit code of a status; 128 and the signal if one ended the program.
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// A program that a test started and goes on beside it. It is killed when this value goes.
#[derive(Debug)]
pub struct Background {
    child: Child,
    what: String,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Background {
    /// Starts a command with its output in files of `directory`.
    pub fn start<S: AsRef<OsStr>>(site: &Site, argv: &[S], directory: &Path, number: u64) -> Result<Background> {
        let stdout = directory.join(format!("exec-{number}.out"));
        let stderr = directory.join(format!("exec-{number}.err"));
        let child = site
            .run(argv)
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?)
            .spawn()
            .with_context(|| format!("run {}", words(argv)))?;
        Ok(Background {
            child,
            what: words(argv),
            stdout,
            stderr,
        })
    }

    /// What it wrote to its standard output until now.
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// What it wrote to its standard error until now.
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// The process id of the program.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    pub fn wait(mut self, limit: Duration) -> Result<Output> {
        let what = format!("the end of {}", self.what);
        let status = wait::until(&what, limit, || Ok(self.child.try_wait()?));
        let status = status.with_context(|| format!("it wrote:\n{}{}", self.stdout(), self.stderr()))?;
        Ok(Output {
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        })
    }

    /// Asks it to end (SIGINT), waits for that, and gives what it wrote.
    pub fn interrupt(self, limit: Duration) -> Result<Output> {
        let pid = rustix::process::Pid::from_child(&self.child);
        // A program that ended by itself meanwhile is no error: `wait` tells how.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        self.wait(limit)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Both fail only for a program that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut file) = File::open(path) {
        // A file that cannot be read to its end shows what was read.
        let _ = file.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
