"""How slow the first steps of a thread are that has slept: steps of the owner's work, timed one by one, repeated."""
import resource, socket, threading, time, sys, ctypes
sys.path.insert(0, "/tmp/h")
import numpy as np
from vllm_fleet.fabric.plan import *
from vllm_fleet.fabric.transports.cuda import nccl_copier as nc, nccl_owner as no
from vllm_fleet.fabric.transports.cuda.nccl_questions import *
from vllm_fleet.fabric.transports.cuda.nccl_pieces import *
from vllm_fleet.fabric.owner import *
from vllm_fleet.fabric.contract import *
from vllm_fleet.wire import fabric as wire
MIB=1<<20; BLOCK=32<<10; POOL=6<<30
def scattered(nbytes):
    rng=np.random.default_rng(nbytes)
    s,t=(rng.permutation(POOL//BLOCK)[:nbytes//BLOCK] for _ in range(2))
    return plan_blocks([BlockShape(BLOCK,BLOCK,POOL//BLOCK)],s,t,"bench")
class EP:
    registrations={}
    allow_read=staticmethod(lambda *a: True)
pool=KVPool((Region(1<<40,POOL,BLOCK,BLOCK,POOL//BLOCK),),cuda=0)
owned=OwnedPool(EP); pid=owned.register(pool)
mem=Memory(np.array([1<<40]),np.array([POOL]),pid,np.array([POOL]),15*MIB)
def work(pay):
    t=[time.monotonic()]
    q=wire.decode_question(pay); t.append(time.monotonic())
    runs=owned.check(q.pool,q.grant,q.runs); t.append(time.monotonic())
    n=runs.total_bytes; a=runs.addresses; t.append(time.monotonic())
    sizes=message_sizes(n,15*MIB,first=True,last=True); t.append(time.monotonic())
    it=lead_and_rest(a,runs.nbytes,sizes,32<<10); x=next(it); t.append(time.monotonic())
    y=next(it); t.append(time.monotonic())
    return np.diff(t)*1e6
def faults(): return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
def main():
    for mib in (32,128):
        plan=scattered(mib*MIB); q=Questions(mem,plan,write=False); pay=q.ask(0).question
        for idle in (0.0,0.002,0.05):
            a,b=socket.socketpair(); rows=[]
            def th():
                for _ in range(30):
                    if a.recv(1)!=b'x': return
                    one=[]
                    for _ in range(6):
                        f=faults(); w=work(pay); one.append((w.sum(),faults()-f,w))
                    rows.append(one); a.send(b'y')
            k=threading.Thread(target=th); k.start()
            for _ in range(30):
                time.sleep(idle); b.send(b'x'); b.recv(1)
            k.join(); rows=rows[5:]
            print(mib,'MiB, slept',idle,'s: us of repetitions',[round(float(np.median([r[i][0] for r in rows])),0) for i in range(6)],'faults',[int(np.median([r[i][1] for r in rows])) for i in range(6)])
            print('     first: decode check total sizes lead rest',np.round(np.median([r[0][2] for r in rows],0),0).tolist(), 'sixth', np.round(np.median([r[5][2] for r in rows],0),0).tolist())
main()
