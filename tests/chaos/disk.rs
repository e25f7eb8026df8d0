//! A small disk for the ledger's table, and having it full.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::Database;
use crate::stage::Stage;

/// Bytes at a time.
const STEP: usize = 64 << 10;

/// A file system in memory, which root can mount.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
}

impl Disk {
    /// At `folder`. `None` where that is not allowed, or where PostgreSQL's
    /// user cannot get there.
    pub fn mount(folder: PathBuf) -> Option<Self> {
        std::fs::create_dir_all(&folder).ok()?;
        let folder = folder.canonicalize().ok()?;
        let path = folder.to_str()?;
        let options = "size=64m,mode=755";
        if !run(
            "mount",
            &["-t", "tmpfs", "-o", options, "ackonce-chaos", path],
        ) {
            return None;
        }
        let disk = Self { folder };
        let space = disk.folder.join("space");
        std::fs::create_dir(&space).ok()?;
        let owned = run("chown", &["postgres:postgres", space.to_str()?]);
        let as_postgres = [
            "--reuid=postgres",
            "--regid=postgres",
            "--init-groups",
            "--",
        ];
        let test = [&as_postgres[..], &["test", "-w", space.to_str()?]].concat();
        (owned && run("setpriv", &test)).then_some(disk)
    }

    /// The tablespace's folder.
    pub fn space(&self) -> PathBuf {
        self.folder.join("space")
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(path) = self.folder.to_str() {
            run("umount", &["-l", path]);
        }
        drop(std::fs::remove_dir(&self.folder));
    }
}

/// Moves the ledger onto the small disk.
pub fn move_ledger(disk: &Disk, db: &Database) {
    if db.count("select count(*) from pg_tablespace where spcname = 'small'") == 0 {
        let space = disk.space();
        db.execute(&format!(
            "create tablespace small location '{}'",
            space.display()
        ));
    }
    db.execute("alter table ackonce.ledger set tablespace small");
}

/// Fills the disk for a while. It happened if a daemon was told by PostgreSQL
/// that it is full (SQLSTATE 53100).
pub fn fill(stage: &Stage<'_>, length: Duration) -> u64 {
    let Some(disk) = stage.servers.disk() else {
        return 0;
    };
    let all = 0..stage.fleet.len();
    let before: Vec<u64> = all
        .clone()
        .map(|daemon| stage.fleet.log_length(daemon))
        .collect();
    // Ends when there is no room left.
    drop(write_until_full(&disk.filler()));
    std::thread::sleep(length);
    std::fs::remove_file(disk.filler()).expect("the filler is removed");
    let mut met = all.zip(before);
    let met = met.any(|(daemon, since)| stage.fleet.log_since(daemon, since).contains("53100"));
    u64::from(met)
}

fn write_until_full(path: &Path) -> std::io::Result<()> {
    let mut filler = std::fs::File::create(path)?;
    loop {
        // The last bit too.
        if filler.write_all(&[0; STEP]).is_err() {
            loop {
                filler.write_all(&[0])?;
            }
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> bool {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
